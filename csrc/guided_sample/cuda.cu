#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/cuda_launch.h"
#include "common/tensor_checks.h"
#include "guided_sample/kernel.cuh"
#include "guided_sample/launch.h"

namespace flexvar {
namespace {

constexpr const char* kOp = "guided_sample";

template <class T, int kThreads>
void launch(const Tensor& logits, GuidedSampleCudaParams<T> params, int64_t multiprocessors,
            cudaStream_t stream) {
  const bool cuts = params.top_k > 0 || (params.top_p > 0 && params.top_p < 1);
  const auto kernel =
      cuts ? guided_sample_kernel<T, kThreads, true> : guided_sample_kernel<T, kThreads, false>;
  const int64_t shared_memory =
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, logits, kOp);
  params.pieces = guided_sample_pieces(params.vocabulary, kThreads);
  if (guided_sample_shared_bytes<T>(params.pieces, kThreads) > shared_memory) params.pieces = 0;
  if (params.pieces == 0) params.pivot_rank = 0;
  const int64_t bytes = guided_sample_shared_bytes<T>(params.pieces, kThreads);
  // As many blocks as a multiprocessor takes at once: each loads a row ahead. The system has 1 KB
  // of shared memory for itself and for every block.
  const int64_t resident =
      std::clamp<int64_t>((shared_memory + 1024) / (bytes + 1024), 1, 1024 / kThreads);
  const int64_t blocks = std::min<int64_t>(params.rows, multiprocessors * resident);
  allow_shared_memory(kernel, bytes, kOp);
  launch_kernel(kOp, stream, kernel, static_cast<unsigned>(blocks), kThreads,
                static_cast<size_t>(bytes), params);
}

template <class T>
void launch(const Tensor& logits, GuidedSampleCudaParams<T> params, cudaStream_t stream) {
  params.logits = static_cast<const T*>(logits.const_data_ptr());
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, logits, kOp);
  // Few threads where rows fill the device: they wait less for each other.
  if (params.rows > 2 * multiprocessors && guided_sample_pieces(params.vocabulary, 256) > 0) {
    launch<T, 256>(logits, params, multiprocessors, stream);
  } else {
    launch<T, 512>(logits, params, multiprocessors, stream);
  }
}

Tensor guided_sample_cuda(const Tensor& logits, int64_t top_k, double top_p, const Tensor& seeds,
                          const Tensor& image_ids, int64_t step) {
  check_guided_sample(logits, top_k, top_p, seeds, image_ids);
  const CudaScope scope(logits);
  const int64_t length = logits.size(1), vocabulary = logits.size(2);
  const int64_t rows = logits.size(0) * length;
  Tensor tokens = torch::stable::new_empty(logits, {logits.size(0), length}, ScalarType::Long);
  if (rows == 0) return tokens;
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor seed = torch::stable::contiguous(seeds), id = torch::stable::contiguous(image_ids);
  const auto kept = static_cast<int32_t>(top_k < vocabulary ? top_k : 0);
  const auto run = [&]<class T>(T) {
    launch<T>(x,
              {nullptr, seed.const_data_ptr<int64_t>(), id.const_data_ptr<int64_t>(),
               tokens.mutable_data_ptr<int64_t>(), step, top_p, grid_size(rows, kOp),
               static_cast<uint32_t>(length), static_cast<int32_t>(vocabulary), kept,
               guided_sample_pivot_rank(vocabulary, kept, top_p), 0},
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
