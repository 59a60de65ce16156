#include <torch/csrc/stable/library.h>

#include "common/cuda_launch.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "guided_sample/kernel.cuh"
#include "guided_sample/launch.h"

namespace flexvar {
namespace {

constexpr const char* kOp = "guided_sample";

template <class T>
void launch(const Tensor& logits, int64_t rows, GuidedSampleCudaParams<T> params,
            cudaStream_t stream) {
  params.logits = static_cast<const T*>(logits.const_data_ptr());
  const unsigned blocks = grid_size(rows, kOp);
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  // Few threads where rows fill the device: they wait less for each other.
  if (rows > 2 * multiprocessors && params.vocabulary <= 256 * 4 * kSamplePieces) {
    launch_kernel(kOp, stream, guided_sample_kernel<T, 256>, blocks, 256, 0, params);
  } else {
    launch_kernel(kOp, stream, guided_sample_kernel<T, 512>, blocks, 512, 0, params);
  }
}

Tensor guided_sample_cuda(const Tensor& logits, int64_t top_k, double top_p, const Tensor& seeds,
                          const Tensor& image_ids, int64_t step) {
  check_guided_sample(logits, top_k, top_p, seeds, image_ids);
  const CudaScope scope(logits);
  const int64_t length = logits.size(1), vocabulary = logits.size(2);
  const int64_t rows = logits.size(0) * length;
  Tensor tokens = empty_contiguous({logits.size(0), length}, ScalarType::Long, device_of(logits));
  if (rows == 0) return tokens;
  const Tensor x = as_contiguous(logits);
  const Tensor seed = as_contiguous(seeds), id = as_contiguous(image_ids);
  const auto kept = static_cast<int32_t>(top_k < vocabulary ? top_k : 0);
  const auto run = [&]<class T>(T) {
    launch<T>(
        x, rows,
        {nullptr, seed.const_data_ptr<int64_t>(), id.const_data_ptr<int64_t>(),
         tokens.mutable_data_ptr<int64_t>(), step, top_p, static_cast<uint32_t>(length),
         static_cast<int32_t>(vocabulary), kept, guided_sample_pivot_rank(vocabulary, kept, top_p)},
        scope.stream());
  };
  if (x.scalar_type() == ScalarType::Half) {
    run(__half{});
  } else if (x.scalar_type() == ScalarType::BFloat16) {
    run(__nv_bfloat16{});
  } else {
    run(float{});
  }
  return tokens;
}

FLEXVAR_LAUNCHERS(m) { m.impl("guided_sample", TORCH_BOX(&guided_sample_cuda)); }

}  // namespace
}  // namespace flexvar
