#include <torch/csrc/stable/library.h>

#include "common/cuda_launch.h"
#include "common/tensor_checks.h"
#include "vq_lookup/kernel.cuh"

namespace flexvar {
namespace {

Tensor vq_lookup_cuda(const Tensor& latents, const Tensor& codebook, bool normalize) {
  check_rank(latents, 2, "vq_lookup", "latents");
  check_dtype(latents, ScalarType::Float, "vq_lookup", "latents");
  STD_TORCH_CHECK(!normalize, "vq_lookup: normalise before");
  const CudaScope scope(latents);
  const int64_t n = latents.size(0);
  Tensor indices = torch::stable::new_empty(latents, {n}, ScalarType::Long);
  if (n == 0) return indices;
  const Tensor x = torch::stable::contiguous(latents), e = torch::stable::contiguous(codebook);
  const VqLookupCudaParams params{x.const_data_ptr<float>(),
                                  e.const_data_ptr<float>(),
                                  indices.mutable_data_ptr<int64_t>(),
                                  n,
                                  e.size(0),
                                  e.size(1)};
  vq_lookup_kernel<<<static_cast<unsigned>((n + 127) / 128), 128, 0, scope.stream()>>>(params);
  check_launch("vq_lookup");
  return indices;
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CUDA, m) { m.impl("vq_lookup", TORCH_BOX(&vq_lookup_cuda)); }

}  // namespace
}  // namespace flexvar
