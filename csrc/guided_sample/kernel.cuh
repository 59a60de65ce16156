// guided_sample on CUDA: a block samples rows one after the other. It copies each into shared
// memory, the next one while it still draws from what it has kept of the one before, and draws from
// all tokens or from the candidates above a pivot. Rows that neither suits (many tokens to
// keep, infinities, a sample that misleads) are bisected, and so are those that are too long for
// shared memory.
#pragma once

#include "guided_sample/all_tokens.cuh"
#include "guided_sample/bisection.cuh"
#include "guided_sample/candidates.cuh"

namespace flexvar {

// Bytes of dynamic shared memory.
template <class T>
int64_t guided_sample_shared_bytes(int32_t pieces, int threads) {
  const size_t storage =
      threads == 256 ? sizeof(CandidateStorage<8>) : sizeof(CandidateStorage<16>);
  return static_cast<int64_t>(storage + sizeof(T) * 4 * pieces * threads);
}

// Blocks of 256 threads that a multiprocessor shall hold: shared memory of 64 or 100 KB has room
// for one or two, and these may use more registers.
constexpr int small_blocks() {
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
  return 2;
#else
  return 4;
#endif
}

// Of the rows blockIdx.x, blockIdx.x + gridDim.x, …, one for each thread: marks those that the
// warps have left.
template <class T>
__device__ inline void find_left_rows(const GuidedSampleCudaParams<T>& params,
                                      SampleStorage& shared) {
  const uint64_t row = blockIdx.x + uint64_t{threadIdx.x} * gridDim.x;
  const bool is_left = row < params.rows && params.tokens[row] == kLeftToBlocks;
  const unsigned marks = __ballot_sync(0xffffffffu, is_left);
  if (threadIdx.x % 32 == 0) shared.left[threadIdx.x / 32] = marks;
  __syncthreads();
}

// The next of these behind `row`, or what is no row.
template <int kWarps>
__device__ inline uint32_t left_row_behind(const SampleStorage& shared, uint32_t row) {
  const auto first =
      static_cast<int32_t>(row + gridDim.x - blockIdx.x) / static_cast<int32_t>(gridDim.x);
  uint32_t marks = 0xffffffffu << first % 32;
#pragma unroll 1
  for (int32_t word = first / 32; word < kWarps; ++word) {
    marks &= shared.left[word];
    if (marks != 0)
      return blockIdx.x + (word * 32u + __ffs(static_cast<int>(marks)) - 1) * gridDim.x;
    marks = 0xffffffffu;
  }
  return UINT32_MAX;
}

// kCuts: whether top-k or top-p cut tokens off.
template <class T, int kThreads, bool kCuts>
__global__ void __launch_bounds__(kThreads, kThreads == 256 ? small_blocks() : small_blocks() / 2)
    guided_sample_kernel(GuidedSampleCudaParams<T> params) {
  constexpr int kWarps = kThreads / 32;
  auto& shared = *dynamic_shared<CandidateStorage<kWarps>>();
  T* const resident = reinterpret_cast<T*>(&shared + 1);
  const int32_t n = params.vocabulary;
  // What one warp does alone falls to different ones at different times, because a warp's place in
  // its block decides which scheduler it has. A row's pivot is never left to the warp that cuts.
  const auto cutting_warp = [](uint32_t row) { return static_cast<int>(row * 0x9e3779b9u >> 30); };
  const auto is_in_pivot_warp = [&](uint32_t row) {
    return ptx::computed_here(threadIdx.x) / 32 == kWarps / 2 + cutting_warp(row);
  };
  const auto logits_of = [&](uint32_t row) { return params.logits + int64_t{row} * n; };

  const auto begin_row = [&](uint32_t row) {
    if (row < params.rows && params.pieces > 0) copy_row<kThreads>(resident, logits_of(row), n);
  };
  const auto choose_pivot = [&](uint32_t row) {
    if (!kCuts || params.pivot_rank == 0 || row >= params.rows || !is_in_pivot_warp(row)) return;
    const float pivot = find_pivot(load_pivot_sample(logits_of(row), n), params.pivot_rank);
    if (threadIdx.x % 32 == 0) shared.pivot = pivot;
  };

  clear_bins<kThreads>(shared);
  const int32_t resident_size = params.pieces * 4 * kThreads;
  for (auto i = n + static_cast<int32_t>(threadIdx.x); i < resident_size; i += kThreads) {
    resident[i] = from_float<T>(-INFINITY);
  }
  if (params.only_left) {
    ptx::griddepcontrol_wait();
    find_left_rows(params, shared);
  }
  bool is_there = false;
#pragma unroll 1
  for (uint32_t last = blockIdx.x - gridDim.x;;) {
    const uint32_t row =
        params.only_left ? left_row_behind<kWarps>(shared, last) : last + gridDim.x;
    if (row >= params.rows) break;
    last = row;
    if (!is_there) {
      begin_row(row);
      choose_pivot(row);
      ptx::cp_async_wait();
      __syncthreads();
    }
    // Few rows are left by the warps: none is copied ahead.
    const auto next_row = [&] { return params.only_left ? UINT32_MAX : row + gridDim.x; };
    const auto begin_next = [&] { begin_row(next_row()); };
    int32_t token = kUnsuited;
    if constexpr (!kCuts) {
      if (params.pieces > 0) {
        token = draw_from_all<kThreads>(params, row, resident, begin_next, shared);
      }
    } else if (params.pivot_rank > 0) {
      token = draw_from_candidates<kThreads>(
          params, row, resident, cutting_warp(row), begin_next, [&] { choose_pivot(next_row()); },
          shared);
    }
    is_there = token != kUnsuited;
    if (token <= kUnsuited) {
      const bool is_resident = params.pieces > 0 && !is_there;
      __syncthreads();
      token = draw_by_bisection<kThreads>(
          params, row, is_resident ? static_cast<const T*>(resident) : logits_of(row), shared);
      __syncthreads();
    }
    is_there = is_there && !params.only_left;
    if (token >= -1) params.tokens[row] = token;
  }
}

}  // namespace flexvar
