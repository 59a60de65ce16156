#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/tensor_checks.h"
#include "vq_lookup/cpu_kernel.h"

namespace flexvar {
namespace {

// Rows of a task, and rows whose group maxima are held at a time.
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kRowsPerPass = 1024;

template <class T>
T* allocate(Tensor& owner, int64_t elements) {
  owner = torch::stable::empty({elements * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte);
  return reinterpret_cast<T*>(owner.mutable_data_ptr());
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor vq_lookup_cpu(const Tensor& latents, const Tensor& codebook, bool normalize) {
  check_rank(latents, 2, "vq_lookup", "latents");
  check_rank(codebook, 2, "vq_lookup", "codebook");
  check_dtype(latents, ScalarType::Float, "vq_lookup", "latents");
  check_dtype(codebook, ScalarType::Float, "vq_lookup", "codebook");
  const int64_t n = latents.size(0), v = codebook.size(0), dim = latents.size(1);
  STD_TORCH_CHECK(codebook.size(1) == dim && v > 0, "vq_lookup: codebook must be [V >= 1, C]");
  Tensor indices = torch::stable::empty({n}, ScalarType::Long);
  if (n == 0) return indices;

  const Tensor rows = torch::stable::contiguous(latents);
  const Tensor codes = torch::stable::contiguous(codebook);
  VqLookupParams params{};
  params.codebook = codes.const_data_ptr<float>();
  params.latents = rows.const_data_ptr<float>();
  params.num_codes = v;
  params.num_latents = n;
  params.dim = dim;
  params.normalize = normalize;
  params.indices = indices.mutable_data_ptr<int64_t>();
  const int64_t blocks = params.blocks();
  const int64_t padded_rows = divide_up(n, kVqRowMultiple) * kVqRowMultiple;
  Tensor owners[7];
  params.packed_codes = allocate<float>(owners[0], blocks * kVqBlockCodes * dim);
  params.negative_half = allocate<float>(owners[1], blocks * kVqBlockCodes);
  params.inverse_norms = allocate<double>(owners[2], v);
  params.block_norms = allocate<double>(owners[3], blocks);
  params.queries = allocate<float>(owners[4], padded_rows * params.padded_dim());
  params.query_norms = allocate<double>(owners[5], n);
  params.group_max =
      allocate<float>(owners[6], std::min(padded_rows, kRowsPerPass) * blocks * kVqMaxLanes);

  const auto prepare_codes = FLEXVAR_SELECT_CPU_KERNEL(vq_prepare_codes);
  const auto prepare_latents = FLEXVAR_SELECT_CPU_KERNEL(vq_prepare_latents);
  const auto score = FLEXVAR_SELECT_CPU_KERNEL(vq_score);
  const auto resolve = FLEXVAR_SELECT_CPU_KERNEL(vq_resolve);
  torch::stable::parallel_for(
      0, blocks, 1, [&](int64_t begin, int64_t end) { prepare_codes(params, begin, end); });
  params.max_code_norm = *std::max_element(params.block_norms, params.block_norms + blocks);
  torch::stable::parallel_for(0, padded_rows, 256, [&](int64_t begin, int64_t end) {
    prepare_latents(params, begin, end);
  });
  const int64_t threads = torch::stable::get_num_threads();
  for (params.first_row = 0; params.first_row < n; params.first_row += kRowsPerPass) {
    const int64_t last_row = std::min(params.first_row + kRowsPerPass, padded_rows);
    const int64_t row_tasks = divide_up(last_row - params.first_row, kRowsPerTask);
    // With few queries the codes are split as well, so that every thread has work.
    const int64_t splits = std::min(blocks, divide_up(2 * threads, row_tasks));
    torch::stable::parallel_for(0, row_tasks * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = params.first_row + task / splits * kRowsPerTask, split = task % splits;
        score(params, row, std::min(row + kRowsPerTask, last_row), split * blocks / splits,
              (split + 1) * blocks / splits);
      }
    });
    torch::stable::parallel_for(params.first_row, std::min(last_row, n), 16,
                                [&](int64_t begin, int64_t end) { resolve(params, begin, end); });
  }
  return indices;
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) { m.impl("vq_lookup", TORCH_BOX(&vq_lookup_cpu)); }

}  // namespace
}  // namespace flexvar
