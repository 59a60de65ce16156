#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/cuda_launch.h"
#include "common/cuda_tensor_map.h"
#include "common/tensor_memory.h"
#include "scale_attention/checks.h"
#include "scale_attention/kernel.cuh"

namespace flexvar {
namespace {

AttentionCudaTensor view_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// Asynchronous copies of 16-bit elements take 16 aligned bytes at a time.
Tensor with_copyable_rows(const Tensor& t) {
  const Tensor rows = with_contiguous_rows(t);
  if (t.scalar_type() != ScalarType::Half && t.scalar_type() != ScalarType::BFloat16) return rows;
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 &&
                       rows.stride(0) % 8 == 0 && rows.stride(1) % 8 == 0 &&
                       rows.stride(2) % 8 == 0;
  if (aligned) return rows;
  Tensor copy =
      empty_contiguous({t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type(), device_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}

// A head's first `tokens` tokens in tiles of 64.
TensorMap map_of(const Tensor& t, int64_t tokens, const char* op) {
  return tensor_map_of({t.const_data_ptr(), t.size(0), t.size(2), tokens, t.size(3), t.stride(0),
                        t.stride(2), t.stride(1), kTensorCoreRows},
                       op);
}
// Whether this device's code may multiply by warpgroups, and use the copy engine.
bool has_warpgroups(const char* op) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, op) == 9;
}
template <class Kernels>
AttentionMaps maps_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t keys,
                      const char* op) {
  if constexpr (Kernels::kHasCopyEngine) {
    if (has_warpgroups(op)) {
      return {map_of(q, q.size(1), op), map_of(k, keys, op), map_of(v, keys, op)};
    }
  }
  return {};
}
template <class Kernels>
AttentionBackwardMaps backward_maps_of(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& grad_out, const char* op) {
  if constexpr (Kernels::kHasCopyEngine) {
    if (has_warpgroups(op)) {
      const int64_t tokens = q.size(1);
      return {map_of(q, tokens, op), map_of(k, tokens, op), map_of(v, tokens, op),
              map_of(grad_out, tokens, op)};
    }
  }
  return {};
}

// Calls run.template operator()<T, kDim>() for the tensor's element type and head dim.
template <class T, class Run>
void dispatch_dim(int64_t dim, const Run& run) {
  switch (dim) {
    case 32:
      return run.template operator()<T, 32>();
    case 64:
      return run.template operator()<T, 64>();
    case 96:
      return run.template operator()<T, 96>();
    default:
      return run.template operator()<T, 128>();
  }
}
template <class Run>
void dispatch(const Tensor& q, const Run& run) {
  switch (q.scalar_type()) {
    case ScalarType::Half:
      return dispatch_dim<__half>(q.size(3), run);
    case ScalarType::BFloat16:
      return dispatch_dim<__nv_bfloat16>(q.size(3), run);
    case ScalarType::Double:
      return dispatch_dim<double>(q.size(3), run);
    default:
      return dispatch_dim<float>(q.size(3), run);
  }
}

// One launch for every kTilesPerLaunch tiles. The kernels of the forward pass wait for the ones
// before them by themselves.
template <class Params, class Tile>
void launch(const char* op, void (*kernel)(Params, TileList<Tile>), int threads,
            size_t shared_bytes, const Params& params, const std::vector<Tile>& tiles,
            int64_t heads, cudaStream_t stream, int64_t parts = 1) {
  if (shared_bytes > 48 * 1024) {
    allow_shared_memory(kernel, static_cast<int64_t>(shared_bytes), op);
  }
  for (size_t begin = 0; begin < tiles.size(); begin += kTilesPerLaunch<Tile>) {
    const size_t count = std::min<size_t>(kTilesPerLaunch<Tile>, tiles.size() - begin);
    TileList<Tile> list;
    std::copy_n(tiles.begin() + begin, count, list.tiles);
    list.count = static_cast<int64_t>(count);
    const dim3 grid(grid_size(heads * static_cast<int64_t>(count), op), 1,
                    static_cast<unsigned>(parts));
    if constexpr (std::is_same_v<Params, AttentionForwardCuda>) {
      launch_overlapping(op, stream, kernel, grid, threads, shared_bytes, params, list);
    } else {
      launch_kernel(op, stream, kernel, grid, threads, shared_bytes, params, list);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> scale_attention_cuda(const Tensor& q_in, const Tensor& k_in,
                                                        const Tensor& v_in,
                                                        std::vector<int64_t> scale_lengths,
                                                        double softmax_scale,
                                                        std::optional<Tensor> q_scale_in) {
  constexpr const char* kOp = "scale_attention";
  check_attention(q_in, k_in, v_in, scale_lengths, q_scale_in);
  const int64_t batch = q_in.size(0), tokens = q_in.size(1), heads = q_in.size(2);
  const CudaScope scope(q_in);
  Tensor out =
      empty_contiguous({batch, tokens, heads, q_in.size(3)}, q_in.scalar_type(), device_of(q_in));
  Tensor logsumexp =
      empty_contiguous({batch, heads, tokens}, attention_arithmetic(q_in), device_of(q_in));
  Tensor inverse_lengths = empty_contiguous({q_scale_in ? 2 : 0, batch, heads, tokens},
                                            attention_arithmetic(q_in), device_of(q_in));
  if (batch * tokens * heads == 0) return {out, logsumexp, inverse_lengths};
  const Tensor q = with_copyable_rows(q_in), k = with_copyable_rows(k_in),
               v = with_copyable_rows(v_in);
  const std::optional<Tensor> q_scale = contiguous_or_none(q_scale_in);
  AttentionForwardCuda params{{},
                              view_of(q),
                              view_of(k),
                              view_of(v),
                              out.mutable_data_ptr(),
                              logsumexp.mutable_data_ptr(),
                              heads,
                              tokens,
                              softmax_scale,
                              data_or_null(q_scale),
                              inverse_lengths_of(inverse_lengths, 0),
                              inverse_lengths_of(inverse_lengths, 1)};
  dispatch(q, [&]<class T, int kDim>() {
    using Kernels = AttentionKernels<T, kDim>;
    params.maps = maps_of<Kernels>(q, k, v, tokens, kOp);
    const std::vector<QueryTile> tiles =
        Kernels::kJoinsScales ? joined_query_tiles(scale_lengths, Kernels::kForwardRows)
                              : query_tiles(scale_lengths, Kernels::kForwardRows);
    launch(kOp, Kernels::kForward, Kernels::kThreads, sizeof(typename Kernels::ForwardShared),
           params, longest_first(tiles), batch * heads, scope.stream());
  });
  return {out, logsumexp, inverse_lengths};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scale_attention_backward_cuda(
    const Tensor& grad_out_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& logsumexp_in, std::vector<int64_t> scale_lengths,
    double softmax_scale, std::optional<Tensor> q_scale_in, const Tensor& inverse_lengths_in) {
  constexpr const char* kOp = "scale_attention_backward";
  check_attention_backward(grad_out_in, q_in, k_in, v_in, out_in, logsumexp_in, scale_lengths,
                           q_scale_in, inverse_lengths_in);
  const int64_t batch = q_in.size(0), tokens = q_in.size(1), heads = q_in.size(2);
  const CudaScope scope(q_in);
  Tensor grad_q =
      empty_contiguous({batch, tokens, heads, q_in.size(3)}, q_in.scalar_type(), device_of(q_in));
  Tensor grad_k = empty_alike(grad_q), grad_v = empty_alike(grad_q);
  Tensor grad_q_scale =
      empty_contiguous({q_scale_in ? heads : 0}, attention_arithmetic(q_in), device_of(q_in));
  if (batch * tokens * heads == 0) {
    return {grad_q, grad_k, grad_v, torch::stable::fill_(grad_q_scale, 0)};
  }
  const Tensor q = with_copyable_rows(q_in), k = with_copyable_rows(k_in),
               v = with_copyable_rows(v_in), out = with_copyable_rows(out_in),
               grad_out = with_copyable_rows(grad_out_in), logsumexp = as_contiguous(logsumexp_in),
               inverse_lengths = as_contiguous(inverse_lengths_in);
  const std::optional<Tensor> q_scale = contiguous_or_none(q_scale_in);
  const Tensor delta = empty_alike(logsumexp);
  std::optional<Tensor> grad_q_scale_parts;
  if (q_scale) grad_q_scale_parts = empty_alike(logsumexp);
  AttentionBackwardCuda params{{},
                               view_of(q),
                               view_of(k),
                               view_of(v),
                               view_of(out),
                               view_of(grad_out),
                               logsumexp.const_data_ptr(),
                               delta.mutable_data_ptr(),
                               nullptr,
                               grad_q.mutable_data_ptr(),
                               grad_k.mutable_data_ptr(),
                               grad_v.mutable_data_ptr(),
                               heads,
                               tokens,
                               softmax_scale,
                               data_or_null(q_scale),
                               inverse_lengths_of(inverse_lengths, 0),
                               inverse_lengths_of(inverse_lengths, 1),
                               q_scale ? grad_q_scale_parts->mutable_data_ptr() : nullptr};
  dispatch(q, [&]<class T, int kDim>() {
    using Kernels = AttentionKernels<T, kDim>;
    const size_t shared = Kernels::backward_shared(has_warpgroups(kOp));
    params.maps = backward_maps_of<Kernels>(q, k, v, grad_out, kOp);
    std::optional<Tensor> logsumexp_in_base_2;
    if constexpr (Kernels::kGradQueriesFindsDelta) {
      logsumexp_in_base_2 = empty_alike(logsumexp);
      params.logsumexp_in_base_2 = logsumexp_in_base_2->mutable_data_ptr();
    } else {
      const int64_t all_tokens = batch * heads * tokens;
      launch_kernel(kOp, scope.stream(), &attention_delta<T, kDim>,
                    grid_size((all_tokens + 15) / 16, kOp), kPlainThreads, 0, params, all_tokens);
    }
    launch(kOp, Kernels::kGradQueries, Kernels::kThreads, shared, params,
           longest_first(Kernels::kJoinsScales
                             ? joined_query_tiles(scale_lengths, Kernels::kBackwardRows)
                             : query_tiles(scale_lengths, Kernels::kBackwardRows)),
           batch * heads, scope.stream());
    launch(
        kOp, Kernels::kGradKeys, Kernels::kThreads, shared, params,
        longest_first(Kernels::kJoinsScales ? full_key_tiles(scale_lengths, Kernels::kBackwardRows)
                                            : key_tiles(scale_lengths, Kernels::kBackwardRows)),
        batch * heads, scope.stream());
    if (q_scale) {
      using A = AttentionArithmetic<T>;
      launch_kernel(kOp, scope.stream(), &attention_grad_q_scale<A>, grid_size(heads, kOp),
                    kQScaleThreads, 0, static_cast<const A*>(params.grad_q_scale_parts),
                    static_cast<A*>(grad_q_scale.mutable_data_ptr()), batch, tokens);
    }
  });
  return {grad_q, grad_k, grad_v, grad_q_scale};
}

Tensor scale_attention_step_cuda(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                 int64_t kv_length, double softmax_scale,
                                 std::optional<Tensor> logit_bound_in) {
  constexpr const char* kOp = "scale_attention_step";
  check_attention_step(q_in, k_in, v_in, kv_length, logit_bound_in);
  const int64_t batch = q_in.size(0), tokens = q_in.size(1), heads = q_in.size(2);
  const CudaScope scope(q_in);
  Tensor out =
      empty_contiguous({batch, tokens, heads, q_in.size(3)}, q_in.scalar_type(), device_of(q_in));
  if (batch * tokens * heads == 0) return out;
  const Tensor q = with_copyable_rows(q_in), k = with_copyable_rows(k_in),
               v = with_copyable_rows(v_in);
  const std::optional<Tensor> logit_bound = contiguous_or_none(logit_bound_in);
  AttentionForwardCuda params{{},      view_of(q), view_of(k), view_of(v),   out.mutable_data_ptr(),
                              nullptr, heads,      tokens,     softmax_scale};
  params.logit_bound = data_or_null(logit_bound);
  dispatch(q, [&]<class T, int kDim>() {
    using Kernels = AttentionKernels<T, kDim>;
    using A = AttentionArithmetic<T>;
    params.maps = maps_of<Kernels>(q, k, v, kv_length, kOp);
    const std::vector<QueryTile> tiles = step_tiles(tokens, kv_length, Kernels::kForwardRows);
    const int64_t count = static_cast<int64_t>(tiles.size()) * batch * heads;
    const int64_t blocks =
        Kernels::kForwardBlocks * int64_t{device_attribute(cudaDevAttrMultiProcessorCount, kOp)};
    const int64_t keys = keys_per_part(count, kv_length, Kernels::kForwardColumns, blocks);
    const int64_t parts = (kv_length + keys - 1) / keys, rows = batch * heads * tokens;
    std::optional<Tensor> part_sums, part_softmax;
    if (parts > 1) {
      const ScalarType arithmetic = attention_arithmetic(q);
      part_sums = empty_contiguous({parts, rows, kDim}, arithmetic, device_of(q));
      part_softmax = empty_contiguous({parts, rows, 2}, arithmetic, device_of(q));
      params.keys_per_part = static_cast<int>(keys);
      params.part_sums = part_sums->mutable_data_ptr();
      params.parts = part_softmax->mutable_data_ptr();
    }
    launch(kOp, Kernels::kForward, Kernels::kThreads, sizeof(typename Kernels::ForwardShared),
           params, tiles, batch * heads, scope.stream(), parts);
    if (parts > 1) {
      static_assert(sizeof(AttentionPart<A>) == 2 * sizeof(A));
      constexpr int64_t kRowsPerBlock = kCombineThreads / 32;
      launch_overlapping(kOp, scope.stream(), &attention_combine<T, kDim>,
                         grid_size((rows + kRowsPerBlock - 1) / kRowsPerBlock, kOp),
                         kCombineThreads, 0, params, rows, static_cast<int>(parts));
    }
  });
  return out;
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("scale_attention", TORCH_BOX(&scale_attention_cuda));
  m.impl("scale_attention_backward", TORCH_BOX(&scale_attention_backward_cuda));
  m.impl("scale_attention_step", TORCH_BOX(&scale_attention_step_cuda));
}

}  // namespace
}  // namespace flexvar
