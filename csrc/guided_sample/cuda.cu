#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/cuda_launch.h"
#include "common/divide_up.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "guided_sample/kernel.cuh"
#include "guided_sample/launch.h"
#include "guided_sample/warp_row.cuh"

namespace flexvar {
namespace {

constexpr const char* kOp = "guided_sample";

// How a kernel of so many threads is launched.
struct Plan {
  int threads;
  int32_t pieces;
  int64_t shared_bytes;
  int64_t blocks;  // that a multiprocessor holds at once: each copies a row ahead
};

template <class T>
Plan make_plan(int64_t vocabulary, int threads, int64_t shared_memory) {
  Plan plan{threads, guided_sample_pieces(vocabulary, threads), 0, 0};
  plan.shared_bytes = guided_sample_shared_bytes<T>(plan.pieces, threads);
  if (plan.shared_bytes > shared_memory) {
    plan.pieces = 0;
    plan.shared_bytes = guided_sample_shared_bytes<T>(0, threads);
  }
  // The system has 1 KB of shared memory for itself and 1 KB for every block.
  plan.blocks =
      std::clamp<int64_t>((shared_memory + 1024) / (plan.shared_bytes + 1024), 1, 1024 / threads);
  return plan;
}

template <class T, int kThreads>
void launch(const Plan& plan, GuidedSampleCudaParams<T> params, int64_t multiprocessors,
            cudaStream_t stream) {
  const bool cuts = params.top_k > 0 || (params.top_p > 0 && params.top_p < 1);
  const auto kernel =
      cuts ? guided_sample_kernel<T, kThreads, true> : guided_sample_kernel<T, kThreads, false>;
  params.pieces = plan.pieces;
  if (plan.pieces == 0) params.pivot_rank = 0;
  // Blocks have few rows each: what one of them takes longer for, bisected rows, others make up
  // for.
  const int64_t rows_per_block = params.only_left ? kThreads : 4;
  const int64_t blocks = std::min<int64_t>(
      params.rows,
      std::max(multiprocessors * plan.blocks, divide_up(int64_t{params.rows}, rows_per_block)));
  allow_shared_memory(kernel, plan.shared_bytes, kOp);
  const auto shared_bytes = static_cast<size_t>(plan.shared_bytes);
  if (params.only_left) {
    launch_overlapping(kOp, stream, kernel, static_cast<unsigned>(blocks), kThreads, shared_bytes,
                       params);
  } else {
    launch_kernel(kOp, stream, kernel, static_cast<unsigned>(blocks), kThreads, shared_bytes,
                  params);
  }
}

// A warp to each row, where there are rows enough for every scheduler to have two. The sample may
// mislead one row in thirty: a warp chooses another pivot then, and leaves the few rows that it
// cannot sample to blocks. Rows that are not aligned, or too long, are all left to them: false.
template <class T>
bool launch_warps(GuidedSampleCudaParams<T> params, int64_t multiprocessors, cudaStream_t stream) {
  constexpr int64_t kRowsPerMultiprocessor = 8;
  const int32_t n = params.vocabulary;
  const int32_t rank = guided_sample_pivot_rank(n, params.top_k, params.top_p, kStretch, 2);
  if (rank == 0 || n % 8 != 0 || n > kMostStretches * kStretch ||
      reinterpret_cast<uintptr_t>(params.logits) % 16 != 0 ||
      params.rows < kRowsPerMultiprocessor * multiprocessors) {
    return false;
  }
  params.pivot_rank = rank;
  params.capacity = guided_sample_capacity(n, rank, params.top_k, kStretch);
  launch_kernel(kOp, stream, guided_sample_warp_kernel<T>, params.rows, 32,
                sizeof(WarpRowStorage) + sizeof(T) * params.capacity, params);
  return true;
}

template <class T>
void launch(const Tensor& logits, GuidedSampleCudaParams<T> params, cudaStream_t stream) {
  params.logits = static_cast<const T*>(logits.const_data_ptr());
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  params.only_left = launch_warps(params, multiprocessors, stream);
  const int64_t shared_memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kOp);
  const Plan few = make_plan<T>(params.vocabulary, 256, shared_memory);
  const Plan many = make_plan<T>(params.vocabulary, 512, shared_memory);
  // Few threads where rows fill the device and as many threads fit, in more blocks: they wait less
  // for each other.
  const bool fits = few.pieces > 0 && few.blocks * few.threads >= many.blocks * many.threads;
  if (params.rows > 2 * multiprocessors && fits && !params.only_left) {
    launch<T, 256>(few, params, multiprocessors, stream);
  } else {
    launch<T, 512>(many, params, multiprocessors, stream);
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
    launch<T>(x,
              {nullptr, seed.const_data_ptr<int64_t>(), id.const_data_ptr<int64_t>(),
               tokens.mutable_data_ptr<int64_t>(), step, top_p, grid_size(rows, kOp),
               static_cast<uint32_t>(length), static_cast<int32_t>(vocabulary), kept,
               guided_sample_pivot_rank(vocabulary, kept, top_p, kPivotSample, 3.5), 0, 0, false},
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
