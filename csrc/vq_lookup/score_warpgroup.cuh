// Scores of many normalised rows by products of warpgroups (sm_90a): at twice the rate of those of
// warps, and without instructions for the codes' fragments.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/score_tensor.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqWarpgroupThreads = 256;
constexpr int kVqWarpgroupBlocks = 2;    // on a multiprocessor
constexpr int kVqWarpgroupMaxSteps = 2;  // that vq_score_warpgroup_kernel is compiled for
constexpr int kVqSquares = 2;            // of 64 rows, for a warpgroup
// Of stages: one that is scored, the next one, which products begin with before all warps are done
// with this one, and one that is copied.
constexpr int kVqWarpgroupBuffers = 3;
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
  alignas(128) __half codes[kVqWarpgroupBuffers][kChunks][kCodes][8];
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

// Begins the products of a square and a chunk, of a warpgroup's rows and a stage's codes.
template <int kSteps>
__device__ __forceinline__ void vq_begin_products(float (&products)[8][4], const __half* rows,
                                                  int square, const __half* codes, int chunk) {
  using Storage = VqWarpgroupStorage<kSteps>;
  ptx::warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const ptx::ChunkedMatrix<__half> left{rows, Storage::kRows * 8, 64,
                                          (k * 2 * Storage::kRows + square * 64) * 8};
    const ptx::ChunkedMatrix<__half> right{codes, Storage::kCodes * 8, 64,
                                           (k * 2 * Storage::kCodes + chunk * kVqChunkCodes) * 8};
    if (k == 0) {
      ptx::warpgroup_multiply<false>(products, left, right);
    } else {
      ptx::warpgroup_multiply<true>(products, left, right);
    }
  }
  ptx::warpgroup_commit();
}

// A thread's maxima over a chunk, in rows lane / 4 and that + 8 of a square.
__device__ __forceinline__ void vq_chunk_maxima(const float (&products)[8][4], float (&maxima)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float pairs[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      pairs[n] = fmaxf(products[n][half * 2], products[n][half * 2 + 1]);
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2) {
#pragma unroll
      for (int n = 0; n < step; ++n) pairs[n] = fmaxf(pairs[n], pairs[n + step]);
    }
    maxima[half] = pairs[0];
  }
}

// A block scores a run of row tiles against the codes, kVqWarpgroupRows rows at a time. While a
// warpgroup looks for maxima of a square's products with a chunk, the next products are computed.
template <int kSteps>
__global__ void __launch_bounds__(vq_warpgroup_threads<kSteps>(), kVqWarpgroupBlocks)
    vq_score_warpgroup_kernel(VqProblem problem, VqWorkspace workspace) {
  if (!ptx::has_warpgroup_products()) return;
  ptx::griddepcontrol_launch_dependents();
  auto& shared = shared_storage<VqWarpgroupStorage<kSteps>>();
  constexpr int kLength = kSteps * 16;
  constexpr int kProducts = kVqSquares * kVqChunksPerStage;  // of a stage
  static_assert(kProducts % 2 == 0);  // so that the first of every stage have the same registers
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int warpgroup_row = warpgroup * kVqSquares * 64;
  const __half* own_rows = shared.latents[0][warpgroup_row];
  const int own_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;  // of a square
  const auto next_buffer = [](int buffer) {
    return buffer + 1 < kVqWarpgroupBuffers ? buffer + 1 : 0;
  };
  VqRun run(problem);
  int copied_stage = run.stage, copied_buffer = 0;  // the latest
  float copied_start = kVqUnitStart;                // of one of its codes
  const auto copy_stage = [&] {
    const int64_t first_code = static_cast<int64_t>(copied_stage) * kVqStageCodes;
    vq_copy_chunks<kVqStageCodes>(shared.codes[copied_buffer],
                                  workspace.codes_half + first_code * kLength, kVqStageCodes);
    ptx::cp_async_commit();
    copied_start = *workspace.start_of(first_code + threadIdx.x % kVqStageCodes);
  };
  // Waits for the latest copies and begins that of the next stage, if the run has one. Returns
  // whether the codes that came have length 1. Everybody is done with the stage before the latest
  // but one, whose buffer the next one gets.
  const auto await_stage = [&](bool has_next) {
    ptx::cp_async_wait<0>();
    ptx::fence_for_warpgroup();
    const bool unit = !__syncthreads_or(!vq_is_unit_start(copied_start));
    if (has_next) {
      copied_stage = copied_stage + 1 < problem.stages ? copied_stage + 1 : 0;
      copied_buffer = next_buffer(copied_buffer);
      copy_stage();
    }
    return unit;
  };
  ptx::griddepcontrol_wait();
  copy_stage();
  int buffer = 0;
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

    float products[2][8][4];
    bool next_unit = await_stage(1 < run.left);
    vq_begin_products<kSteps>(products[0], own_rows, 0, shared.codes[buffer][0][0], 0);
#pragma unroll 1
    for (int stage = 0; stage < part.stages; ++stage) {
      const bool unit = next_unit;
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        const int square = i / kVqChunksPerStage, chunk = i % kVqChunksPerStage;
        const int next = (i + 1) % kProducts;
        int from = buffer;
        if (next == 0) {
          // Behind the part's last stage, products that nobody looks at spare the loop a branch.
          if (stage + 1 < part.stages) {
            next_unit = await_stage(stage + 2 < run.left);
            from = next_buffer(buffer);
          }
          buffer = next_buffer(buffer);
        }
        const auto begin_next = [&] {
          vq_begin_products<kSteps>(products[(i + 1) % 2], own_rows, next / kVqChunksPerStage,
                                    shared.codes[from][0][0], next % kVqChunksPerStage);
        };
        float (&done)[8][4] = products[i % 2];
        // ptxas waits for all products at once if some from before the loop, or from its end, are
        // under way when others begin.
        if (i == 0) {
          ptx::warpgroup_wait<0>();
          ptx::hold_registers(done);
          begin_next();
        } else {
          begin_next();
          ptx::warpgroup_wait<1>();
          ptx::hold_registers(done);
        }
        float start = kVqUnitStart;
        if (!unit) {
          start = 0;
          const int64_t first_code =
              static_cast<int64_t>(part.first_stage + stage) * kVqStageCodes +
              chunk * kVqChunkCodes + lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const float* two = workspace.start_of(first_code + n * 8);
#pragma unroll
            for (int j = 0; j < 4; ++j) done[n][j] += two[j % 2];
          }
        }
        float maxima[2];
        vq_chunk_maxima(done, maxima);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          vq_insert(tops[square][half], maxima[half] + start, stage * kVqChunksPerStage + chunk);
        }
      }
    }
    ptx::warpgroup_wait<0>();
    ptx::hold_registers(products[0]);

#pragma unroll
    for (int square = 0; square < kVqSquares; ++square) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + warpgroup_row + square * 64 + own_row + half * 8;
        if (row < problem.num_latents) {
          part.store(problem, workspace, row, lane % 4, tops[square][half]);
        }
      }
    }
  }
}

}  // namespace flexvar
