#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/cpu_memory.h"
#include "common/tensor_checks.h"
#include "guided_sample/cpu_kernel.h"
#include "guided_sample/launch.h"

namespace flexvar {
namespace {

Tensor guided_sample_cpu(const Tensor& logits, int64_t top_k, double top_p, const Tensor& seeds,
                         const Tensor& image_ids, int64_t step) {
  check_guided_sample(logits, top_k, top_p, seeds, image_ids);
  const int64_t length = logits.size(1), vocabulary = logits.size(2);
  const int64_t rows = logits.size(0) * length;
  Tensor tokens = empty_cpu({logits.size(0), length}, ScalarType::Long);
  if (rows == 0) return tokens;
  const Tensor x = as_contiguous(logits);
  const Tensor seed = as_contiguous(seeds), id = as_contiguous(image_ids);
  const GuidedSampleParams params{x.const_data_ptr(),
                                  float_element(x.scalar_type(), "guided_sample", "logits"),
                                  seed.const_data_ptr<int64_t>(),
                                  id.const_data_ptr<int64_t>(),
                                  tokens.mutable_data_ptr<int64_t>(),
                                  length,
                                  vocabulary,
                                  top_k,
                                  top_p,
                                  step};
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(guided_sample_rows);
  const int64_t chunks = std::min<int64_t>(rows, torch::stable::get_num_threads());
  const int64_t scratch_size = guided_sample_scratch(vocabulary);
  Scratch<int32_t> scratch(chunks * scratch_size);
  int32_t* const scratch_data = scratch.data();
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      kernel(params, rows * chunk / chunks, rows * (chunk + 1) / chunks,
             scratch_data + chunk * scratch_size);
    }
  });
  return tokens;
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("guided_sample", TORCH_BOX(&guided_sample_cpu));
}

}  // namespace
}  // namespace flexvar
