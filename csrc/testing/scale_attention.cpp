#include "scale_attention/kernel.cuh"
#include "scale_attention/plan.h"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

// A [B, L, H, D] view into an array [B, L, S, H, D] (S = 3 for fused queries, keys and values).
template <class T>
AttentionCudaTensor slice(const T* data, const py::array& array, int index) {
  const int64_t slices = array.shape(2), heads = array.shape(3), dim = array.shape(4);
  return {data + index * heads * dim, array.shape(1) * slices * heads * dim, slices * heads * dim,
          dim};
}

// One launch for every kTilesPerLaunch tiles.
template <class Params, class Tile>
void launch(DeviceMemory& memory, void (*kernel)(Params, TileList<Tile>), int threads,
            size_t shared_bytes, const Params& params, const std::vector<Tile>& tiles,
            int64_t heads, int64_t parts = 1) {
  for (size_t begin = 0; begin < tiles.size(); begin += kTilesPerLaunch) {
    const size_t count = std::min<size_t>(kTilesPerLaunch, tiles.size() - begin);
    TileList<Tile> list = {};
    std::copy_n(tiles.begin() + begin, count, list.tiles);
    memory.launch(
        kernel,
        {{static_cast<unsigned>(heads), static_cast<unsigned>(count), static_cast<unsigned>(parts)},
         {static_cast<unsigned>(threads), 1, 1},
         shared_bytes},
        params, list);
  }
}

// out, logsumexp and, with q_scale, the inverse lengths of q and k.
template <class T, int kDim>
std::vector<py::array> forward(const py::array& qkv, const std::vector<int64_t>& scale_lengths,
                               double softmax_scale, const std::optional<py::array>& q_scale,
                               const EmulationOptions& options) {
  using Kernels = AttentionKernels<T, kDim>;
  using A = AttentionArithmetic<T>;
  DeviceMemory memory(options);
  const auto batch = qkv.shape(0), tokens = qkv.shape(1), heads = qkv.shape(3);
  const T* data = memory.input<T>("qkv", qkv);
  T* out = memory.output<T>("out", {batch, tokens, heads, kDim});
  A* logsumexp = memory.output<A>("logsumexp", {batch, heads, tokens});
  A* inverse_lengths[2] = {};
  if (q_scale) {
    for (A*& part : inverse_lengths) {
      part = memory.output<A>("inverse_lengths", {batch, heads, tokens});
    }
  }
  launch(memory, Kernels::kForward, Kernels::kThreads, sizeof(typename Kernels::ForwardShared),
         AttentionForwardCuda{slice(data, qkv, 0), slice(data, qkv, 1), slice(data, qkv, 2), out,
                              logsumexp, heads, tokens, softmax_scale,
                              q_scale ? memory.input<A>("q_scale", *q_scale) : nullptr,
                              inverse_lengths[0], inverse_lengths[1]},
         longest_first(query_tiles(scale_lengths, Kernels::kForwardRows)), batch * heads);
  std::vector<py::array> results{memory.fetch(out), memory.fetch(logsumexp)};
  if (q_scale) {
    for (A* part : inverse_lengths) results.push_back(memory.fetch(part));
  }
  return results;
}

template <class T, int kDim>
std::vector<py::array> step(const py::array& q, const py::array& cache, int64_t kv_length,
                            double softmax_scale, const std::optional<py::array>& logit_bound,
                            std::optional<int> keys_per_part, const EmulationOptions& options) {
  using Kernels = AttentionKernels<T, kDim>;
  using A = AttentionArithmetic<T>;
  DeviceMemory memory(options);
  const auto batch = q.shape(0), tokens = q.shape(1), heads = q.shape(3);
  const T* queries = memory.input<T>("q", q);
  const T* data = memory.input<T>("cache", cache);
  T* out = memory.output<T>("out", {batch, tokens, heads, kDim});
  AttentionForwardCuda params{slice(queries, q, 0),
                              slice(data, cache, 0),
                              slice(data, cache, 1),
                              out,
                              nullptr,
                              heads,
                              tokens,
                              softmax_scale};
  if (logit_bound) params.logit_bound = memory.input<A>("logit_bound", *logit_bound);
  const int64_t rows = batch * heads * tokens;
  int64_t parts = 1;
  if (keys_per_part) {
    parts = (kv_length + *keys_per_part - 1) / *keys_per_part;
    params.keys_per_part = *keys_per_part;
    params.part_sums = memory.workspace<A>("part_sums", {parts, rows, kDim});
    params.parts = memory.workspace<A>("parts", {parts, rows, 2});
  }
  launch(memory, Kernels::kForward, Kernels::kThreads, sizeof(typename Kernels::ForwardShared),
         params, step_tiles(tokens, kv_length, Kernels::kForwardRows), batch * heads, parts);
  if (keys_per_part) {
    constexpr int64_t kRowsPerBlock = kCombineThreads / 32;
    const auto blocks = static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock);
    memory.launch(attention_combine<T, kDim>, {{blocks, 1, 1}, {kCombineThreads, 1, 1}, 0}, params,
                  rows, static_cast<int>(parts));
  }
  return {memory.fetch(out)};
}

template <class T, int kDim>
std::vector<py::array> backward(const py::array& grad_out, const py::array& qkv,
                                const py::array& out, const py::array& logsumexp,
                                const std::vector<int64_t>& scale_lengths, double softmax_scale,
                                const std::optional<py::array>& q_scale,
                                const std::vector<py::array>& inverse_lengths,
                                const EmulationOptions& options) {
  using Kernels = AttentionKernels<T, kDim>;
  using A = AttentionArithmetic<T>;
  DeviceMemory memory(options);
  const auto batch = qkv.shape(0), tokens = qkv.shape(1), heads = qkv.shape(3);
  const T* data = memory.input<T>("qkv", qkv);
  A* delta = memory.output<A>("delta", {batch, heads, tokens});
  T* grads[3];
  for (T*& grad : grads) grad = memory.output<T>("grad", {batch, tokens, heads, kDim});
  const A* inverse[2] = {};
  for (size_t i = 0; i < inverse_lengths.size(); ++i) {
    inverse[i] = memory.input<A>("inverse_lengths", inverse_lengths[i]);
  }
  A* parts = q_scale ? memory.workspace<A>("grad_q_scale_parts", {batch, heads, tokens}) : nullptr;
  const AttentionBackwardCuda params{slice(data, qkv, 0),
                                     slice(data, qkv, 1),
                                     slice(data, qkv, 2),
                                     slice(memory.input<T>("out", out), out, 0),
                                     slice(memory.input<T>("grad_out", grad_out), grad_out, 0),
                                     memory.input<A>("logsumexp", logsumexp),
                                     delta,
                                     grads[0],
                                     grads[1],
                                     grads[2],
                                     heads,
                                     tokens,
                                     softmax_scale,
                                     q_scale ? memory.input<A>("q_scale", *q_scale) : nullptr,
                                     inverse[0],
                                     inverse[1],
                                     parts};
  const int64_t all_tokens = batch * heads * tokens;
  memory.launch(&attention_delta<T, kDim>,
                {{static_cast<unsigned>((all_tokens + 15) / 16), 1, 1}, {kPlainThreads, 1, 1}, 0},
                params, all_tokens);
  constexpr size_t kShared = sizeof(typename Kernels::BackwardShared);
  launch(memory, Kernels::kGradQueries, Kernels::kThreads, kShared, params,
         longest_first(query_tiles(scale_lengths, Kernels::kBackwardRows)), batch * heads);
  launch(memory, Kernels::kGradKeys, Kernels::kThreads, kShared, params,
         longest_first(key_tiles(scale_lengths, Kernels::kBackwardRows)), batch * heads);
  std::vector<py::array> results;
  for (T* grad : grads) results.push_back(memory.fetch(grad));
  if (q_scale) {
    A* grad_q_scale = memory.output<A>("grad_q_scale", {heads});
    memory.launch(&attention_grad_q_scale<A>,
                  {{static_cast<unsigned>(heads), 1, 1}, {kQScaleThreads, 1, 1}, 0}, parts,
                  grad_q_scale, int64_t{batch}, int64_t{tokens});
    results.push_back(memory.fetch(grad_q_scale));
  }
  return results;
}

// scale_attention_float32_64 and so on.
template <class T, int kDim>
void bind(py::module_& module, const std::string& dtype) {
  const std::string suffix = dtype + "_" + std::to_string(kDim);
  module.def(("scale_attention_" + suffix).c_str(), &forward<T, kDim>);
  module.def(("scale_attention_step_" + suffix).c_str(), &step<T, kDim>);
  module.def(("scale_attention_backward_" + suffix).c_str(), &backward<T, kDim>);
}

// (forward, backward) for an element type and head dim.
template <class T, int kDim>
std::pair<size_t, size_t> shared_bytes() {
  if constexpr (kOnTensorCores<T>) {
    return {sizeof(TensorCoreForwardShared<T, kDim>), sizeof(TensorCoreBackwardShared<T, kDim>)};
  } else {
    using A = AttentionArithmetic<T>;
    return {sizeof(PlainForwardShared<A, kDim>), sizeof(PlainBackwardShared<A, kDim>)};
  }
}
template <class T>
void add_shared_bytes(py::dict& bytes, const char* type) {
  bytes[py::make_tuple(type, 32)] = shared_bytes<T, 32>();
  bytes[py::make_tuple(type, 64)] = shared_bytes<T, 64>();
  bytes[py::make_tuple(type, 96)] = shared_bytes<T, 96>();
  bytes[py::make_tuple(type, 128)] = shared_bytes<T, 128>();
}

}  // namespace

EMULATED_BINDINGS(scale_attention, module) {
  // Dynamic shared memory, which no compiler reports: {(type, head dim): (forward, backward)}.
  module.def("scale_attention_shared_bytes", [] {
    py::dict bytes;
    add_shared_bytes<float>(bytes, "float");
    add_shared_bytes<double>(bytes, "double");
    add_shared_bytes<__half>(bytes, "__half");
    add_shared_bytes<__nv_bfloat16>(bytes, "__nv_bfloat16");
    return bytes;
  });
  bind<float, 32>(module, "float32");
  bind<float, 64>(module, "float32");
  bind<float, 128>(module, "float32");
  bind<double, 64>(module, "float64");
  bind<__half, 64>(module, "float16");
  bind<__half, 96>(module, "float16");
  bind<__nv_bfloat16, 32>(module, "bfloat16");
  bind<__nv_bfloat16, 64>(module, "bfloat16");
  bind<__nv_bfloat16, 128>(module, "bfloat16");
}

}  // namespace flexvar::emulation
