#include "append_qkv/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

// qkv [B, l, 3, H, D], caches [B, L, H, D] -> q, k_cache, v_cache.
template <class From, class To, class Real, int kDim>
std::vector<py::array> run(const py::array& qkv, const py::array& k_cache, const py::array& v_cache,
                           int64_t position, const std::optional<py::array>& q_scale,
                           const EmulationOptions& options) {
  DeviceMemory memory(options);
  const int64_t batch = qkv.shape(0), tokens = qkv.shape(1), heads = qkv.shape(3);
  const int64_t token_stride = heads * kDim, image_stride = k_cache.shape(1) * token_stride;
  To* q = memory.output<To>("q", {batch, tokens, heads, kDim});
  To* k = memory.input_output<To>("k_cache", k_cache);
  To* v = memory.input_output<To>("v_cache", v_cache);
  const AppendQkvCudaParams<From, To, Real> params{
      memory.input<From>("qkv", qkv),
      q_scale ? memory.input<Real>("q_scale", *q_scale) : nullptr,
      q,
      k + position * token_stride,
      v + position * token_stride,
      batch * tokens * 3 * heads,
      tokens,
      heads,
      image_stride,
      token_stride,
      image_stride,
      token_stride,
      options.misalignment == 0};
  const auto blocks = static_cast<unsigned>((params.vectors + kAppendVectors - 1) / kAppendVectors);
  memory.launch(append_qkv_kernel<From, To, Real, kDim>,
                {{blocks, 1, 1}, {kAppendThreads, 1, 1}, 0}, params);
  return {memory.fetch(q), memory.fetch(k), memory.fetch(v)};
}

}  // namespace

EMULATED_BINDINGS(append_qkv, module) {
  // Every pair of dtypes, every head dim.
  module.def("append_qkv_float32_32", &run<float, float, float, 32>);
  module.def("append_qkv_float32_float16_96", &run<float, __half, float, 96>);
  module.def("append_qkv_float32_bfloat16_128", &run<float, __nv_bfloat16, float, 128>);
  module.def("append_qkv_float16_128", &run<__half, __half, float, 128>);
  module.def("append_qkv_float16_float32_64", &run<__half, float, float, 64>);
  module.def("append_qkv_float16_bfloat16_32", &run<__half, __nv_bfloat16, float, 32>);
  module.def("append_qkv_bfloat16_64", &run<__nv_bfloat16, __nv_bfloat16, float, 64>);
  module.def("append_qkv_bfloat16_float32_96", &run<__nv_bfloat16, float, float, 96>);
  module.def("append_qkv_bfloat16_float16_32", &run<__nv_bfloat16, __half, float, 32>);
  module.def("append_qkv_float64_128", &run<double, double, double, 128>);
}

}  // namespace flexvar::emulation
