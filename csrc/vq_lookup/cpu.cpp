#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "common/tensor_checks.h"
#include "vq_lookup/cpu_kernel.h"

namespace flexvar {
namespace {

std::vector<float> prepared_rows(const Tensor& t, bool normalize) {
  const int64_t rows = t.size(0), dim = t.size(1);
  const Tensor contiguous = torch::stable::contiguous(t);
  const float* in = contiguous.const_data_ptr<float>();
  std::vector<float> out(in, in + rows * dim);
  for (int64_t r = 0; normalize && r < rows; ++r) {
    float sum = 0;
    for (int64_t c = 0; c < dim; ++c) sum += out[r * dim + c] * out[r * dim + c];
    const float norm = std::max(std::sqrt(sum), 1e-12f);
    for (int64_t c = 0; c < dim; ++c) out[r * dim + c] /= norm;
  }
  return out;
}

Tensor vq_lookup_cpu(const Tensor& latents, const Tensor& codebook, bool normalize) {
  check_rank(latents, 2, "vq_lookup", "latents");
  check_rank(codebook, 2, "vq_lookup", "codebook");
  check_dtype(latents, ScalarType::Float, "vq_lookup", "latents");
  check_dtype(codebook, ScalarType::Float, "vq_lookup", "codebook");
  const int64_t n = latents.size(0), v = codebook.size(0), dim = latents.size(1);
  STD_TORCH_CHECK(codebook.size(1) == dim && v > 0, "vq_lookup: codebook must be [V >= 1, C]");
  Tensor indices = torch::stable::empty({n}, ScalarType::Long);
  if (n == 0) return indices;
  const std::vector<float> x = prepared_rows(latents, normalize);
  const std::vector<float> e = prepared_rows(codebook, normalize);
  std::vector<float> half(v);
  for (int64_t i = 0; i < v; ++i) {
    for (int64_t c = 0; c < dim; ++c) half[i] += 0.5f * e[i * dim + c] * e[i * dim + c];
  }
  const VqLookupParams params{x.data(), e.data(), half.data(), indices.mutable_data_ptr<int64_t>(),
                              v,        dim};
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(vq_lookup_rows);
  torch::stable::parallel_for(0, n, 16,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return indices;
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) { m.impl("vq_lookup", TORCH_BOX(&vq_lookup_cpu)); }

}  // namespace
}  // namespace flexvar
