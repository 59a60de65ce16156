// Scores of many normalised rows by products of warpgroups (sm_90a), without instructions for the
// codes' fragments.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/score_tensor.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqWarpgroupThreads = 256;
constexpr int kVqWarpgroupBlocks = 2;    // on a multiprocessor
constexpr int kVqWarpgroupMaxSteps = 2;  // that vq_score_warpgroup_kernel is compiled for
constexpr int kVqSquares = 2;            // of 64 rows, for a warpgroup
constexpr int kVqWarpgroupRows = kVqWarpgroupThreads / 128 * kVqSquares * 64;

// Threads of a block; without products of warpgroups the kernel is empty and takes but one warp,
// which tells the launcher.
template <int kSteps>
__host__ __device__ constexpr int vq_warpgroup_threads() {
  return ptx::has_warpgroup_products() ? kVqWarpgroupThreads : 32;
}

// Rows as chunks of eight components. Two more of them put a row's chunks into different banks.
template <int kSteps>
struct VqWarpgroupStorage {
  static constexpr int kChunks = kSteps * 2;
  static constexpr int kCodes = kVqStageCodes + 2, kRows = kVqWarpgroupRows + 2;
  alignas(128) __half codes[2][kChunks][kCodes][8];
  alignas(128) __half latents[kChunks][kRows][8];
};

// Starts copying `kCount` rows from the first on, of which `there` exist; the others become zero.
template <int kCount, int kChunks, int kPadded>
__device__ __forceinline__ void vq_copy_chunks(__half (&shared)[kChunks][kPadded][8],
                                               const __half* rows, int64_t there) {
#pragma unroll
  for (int i = 0; i < kCount * kChunks / kVqWarpgroupThreads; ++i) {
    const int piece = static_cast<int>(threadIdx.x) + i * kVqWarpgroupThreads;
    const int row = piece / kChunks;
    ptx::cp_async<16>(shared[piece % kChunks][row], rows + piece * 8, row < there);
  }
}

// What the scores of codes of length 1 begin with. Others, and those that are absent, are added to
// their products one by one.
constexpr float kVqUnitStart = -0.5f;
__device__ __forceinline__ bool vq_is_unit_start(float start) {
  return fabsf(start - kVqUnitStart) <= 0x1p-22f;
}

// A thread's maxima over chunk kChunk of a stage, in rows lane / 4 and that + 8 of a square.
template <int kChunk>
__device__ __forceinline__ void vq_chunk_maxima(const float (&products)[16][4],
                                                float (&maxima)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float pairs[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float (&four)[4] = products[kChunk * 8 + n];
      pairs[n] = fmaxf(four[half * 2], four[half * 2 + 1]);
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2) {
#pragma unroll
      for (int n = 0; n < step; ++n) pairs[n] = fmaxf(pairs[n], pairs[n + step]);
    }
    maxima[half] = pairs[0];
  }
}

// A block scores a run of row tiles against the codes, kVqWarpgroupRows rows at a time.
template <int kSteps>
__global__ void __launch_bounds__(vq_warpgroup_threads<kSteps>(), kVqWarpgroupBlocks)
    vq_score_warpgroup_kernel(VqProblem problem, VqWorkspace workspace) {
  if (!ptx::has_warpgroup_products()) return;
  ptx::griddepcontrol_launch_dependents();
  using Storage = VqWarpgroupStorage<kSteps>;
  auto& shared = shared_storage<Storage>();
  constexpr int kLength = kSteps * 16;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int own_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;  // of a square
  VqRun run(problem);
  int next_stage = run.stage;
  int buffer = 0;
  float next_start = kVqUnitStart;  // of one of the next stage's codes
  const auto copy_stage = [&](int to) {
    const int64_t first_code = static_cast<int64_t>(next_stage) * kVqStageCodes;
    vq_copy_chunks<kVqStageCodes>(shared.codes[to], workspace.codes_half + first_code * kLength,
                                  kVqStageCodes);
    next_start = *workspace.start_of(first_code + threadIdx.x % kVqStageCodes);
  };
  ptx::griddepcontrol_wait();
  copy_stage(buffer);
  for (; run.left > 0; run.advance(problem)) {
    const VqPart part = run.part(problem);
    const int64_t first_row = part.row_tile * kVqWarpgroupRows;
    // Everybody has waited for the products of the tile before, whose rows make way.
    __syncthreads();
    vq_copy_chunks<kVqWarpgroupRows>(shared.latents, workspace.latents_half + first_row * kLength,
                                     problem.num_latents - first_row);
    ptx::cp_async_commit();
    VqTop tops[kVqSquares][2];
#pragma unroll
    for (auto& two : tops) two[0] = two[1] = vq_no_top();

#pragma unroll 1
    for (int stage = 0; stage < part.stages; ++stage) {
      ptx::cp_async_wait<0>();
      ptx::fence_for_warpgroup();
      // The stage is there, and everybody is done with the one before.
      const bool unit = !__syncthreads_or(!vq_is_unit_start(next_start));
      const int64_t first_code = static_cast<int64_t>(next_stage) * kVqStageCodes;
      next_stage = next_stage + 1 < problem.stages ? next_stage + 1 : 0;
      if (stage + 1 < run.left) {  // in the next tile's part, perhaps
        copy_stage(buffer ^ 1);
        ptx::cp_async_commit();
      }
#pragma unroll
      for (int square = 0; square < kVqSquares; ++square) {
        const int square_row = (warpgroup * kVqSquares + square) * 64;
        if (first_row + square_row >= problem.num_latents) continue;
        float products[16][4];
        ptx::warpgroup_begin();
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const ptx::ChunkedMatrix<__half> left{shared.latents[k * 2][square_row],
                                                Storage::kRows * 8, 64};
          const ptx::ChunkedMatrix<__half> right{shared.codes[buffer][k * 2][0],
                                                 Storage::kCodes * 8, 64};
          if (k == 0) {
            ptx::warpgroup_multiply<false>(products, left, right);
          } else {
            ptx::warpgroup_multiply<true>(products, left, right);
          }
        }
        ptx::warpgroup_end();
        ptx::hold_registers(products);
        float start = kVqUnitStart;
        if (!unit) {
          start = 0;
#pragma unroll
          for (int n = 0; n < 16; ++n) {
            const float* two = workspace.start_of(first_code + n * 8 + lane % 4 * 2);
#pragma unroll
            for (int i = 0; i < 4; ++i) products[n][i] += two[i % 2];
          }
        }
        float maxima[kVqChunksPerStage][2];
        vq_chunk_maxima<0>(products, maxima[0]);
        vq_chunk_maxima<1>(products, maxima[1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int chunk = 0; chunk < kVqChunksPerStage; ++chunk) {
            vq_insert(tops[square][half], maxima[chunk][half] + start,
                      stage * kVqChunksPerStage + chunk);
          }
        }
      }
      buffer ^= 1;
    }

#pragma unroll
    for (int square = 0; square < kVqSquares; ++square) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + (warpgroup * kVqSquares + square) * 64 + own_row + half * 8;
        if (row < problem.num_latents) {
          part.store(problem, workspace, row, lane % 4, tops[square][half]);
        }
      }
    }
  }
}

}  // namespace flexvar
