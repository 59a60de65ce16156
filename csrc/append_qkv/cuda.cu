#include <torch/csrc/stable/library.h>

#include "append_qkv/checks.h"
#include "append_qkv/kernel.cuh"
#include "common/cuda_launch.h"
#include "common/divide_up.h"
#include "common/tensor_memory.h"

namespace flexvar {
namespace {

template <class From, class To, class Real>
void launch(const Tensor& qkv, const std::optional<Tensor>& q_scale, Tensor& q, Tensor& k_cache,
            Tensor& v_cache, int64_t position, cudaStream_t stream) {
  const int64_t heads = qkv.size(3), dim = qkv.size(4);
  const int64_t vectors = qkv.size(0) * qkv.size(1) * 3 * heads;
  STD_TORCH_CHECK(vectors < int64_t{1} << 32, "append_qkv: qkv is too large");
  AppendQkvCudaParams<From, To, Real> params{
      static_cast<const From*>(qkv.const_data_ptr()),
      q_scale ? static_cast<const Real*>(q_scale->const_data_ptr()) : nullptr,
      static_cast<To*>(q.mutable_data_ptr()),
      static_cast<To*>(cache_row(k_cache, position)),
      static_cast<To*>(cache_row(v_cache, position)),
      static_cast<unsigned>(vectors),
      static_cast<unsigned>(qkv.size(1)),
      static_cast<unsigned>(heads),
      k_cache.stride(0),
      k_cache.stride(1),
      v_cache.stride(0),
      v_cache.stride(1),
      true};
  const auto is_aligned = [](const void* pointer, size_t element) {
    return reinterpret_cast<uintptr_t>(pointer) % (kAppendChunk * element) == 0;
  };
  params.aligned = is_aligned(params.qkv, sizeof(From)) && is_aligned(params.q, sizeof(To)) &&
                   is_aligned(params.k, sizeof(To)) && is_aligned(params.v, sizeof(To));
  const int64_t strides[] = {params.k_image_stride, params.k_token_stride, params.v_image_stride,
                             params.v_token_stride};
  for (const int64_t stride : strides) {
    params.aligned = params.aligned && stride % kAppendChunk == 0;
  }
  const int64_t blocks = divide_up(vectors, kAppendVectors);
  const auto run = [&](void (*kernel)(AppendQkvCudaParams<From, To, Real>)) {
    launch_overlapping("append_qkv", stream, kernel, grid_size(blocks, "append_qkv"),
                       kAppendThreads, 0, params);
  };
  switch (dim) {
    case 32:
      run(append_qkv_kernel<From, To, Real, 32>);
      break;
    case 64:
      run(append_qkv_kernel<From, To, Real, 64>);
      break;
    case 96:
      run(append_qkv_kernel<From, To, Real, 96>);
      break;
    default:
      STD_TORCH_CHECK(dim == 128, "append_qkv: head dim must be 32, 64, 96 or 128, got ", dim);
      run(append_qkv_kernel<From, To, Real, 128>);
  }
}

// Calls run(element()) for a tensor's 16- or 32-bit type.
template <class Run>
void with_element(const Tensor& t, const Run& run) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return run(__half{});
    case ScalarType::BFloat16:
      return run(__nv_bfloat16{});
    default:
      return run(float{});
  }
}

Tensor append_qkv_cuda(const Tensor& qkv_in, Tensor k_cache, Tensor v_cache, int64_t position,
                       std::optional<Tensor> q_scale_in) {
  check_append_qkv(qkv_in, k_cache, v_cache, position, q_scale_in);
  const CudaScope scope(qkv_in);
  Tensor q = empty_contiguous({qkv_in.size(0), qkv_in.size(1), qkv_in.size(3), qkv_in.size(4)},
                              k_cache.scalar_type(), device_of(k_cache));
  if (q.numel() == 0) return q;
  const Tensor qkv = as_contiguous(qkv_in);
  std::optional<Tensor> q_scale;
  if (q_scale_in) q_scale = as_contiguous(*q_scale_in);
  if (qkv.scalar_type() == ScalarType::Double) {
    launch<double, double, double>(qkv, q_scale, q, k_cache, v_cache, position, scope.stream());
    return q;
  }
  with_element(qkv, [&]<class From>(From) {
    with_element(q, [&]<class To>(To) {
      launch<From, To, float>(qkv, q_scale, q, k_cache, v_cache, position, scope.stream());
    });
  });
  return q;
}

FLEXVAR_LAUNCHERS(m) { m.impl("append_qkv", TORCH_BOX(&append_qkv_cuda)); }

}  // namespace
}  // namespace flexvar
