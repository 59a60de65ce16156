// Scores of normalised rows with fp16 tensor cores.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqTensorThreads = 128;
constexpr int kVqTensorBlocks = 3;  // on a multiprocessor

// Rows of a warp, in fragments of 16: as many as the registers allow, since all of them share the
// codes' fragments; or 1, where there are few rows.
__host__ __device__ constexpr int vq_row_fragments(int steps) { return steps <= 2 ? 4 : 2; }
__host__ __device__ constexpr int vq_tensor_rows(int fragments) {
  return kVqTensorThreads / 32 * 16 * fragments;
}

template <int kSteps>
struct VqTensorStorage {
  // 16 bytes of padding put the eight rows that ldmatrix reads at once into different banks.
  alignas(16) __half codes[2][kVqStageCodes][kSteps * 16 + 8];
  alignas(16) float starts[2][kVqStageCodes / 2][4];
};

// Puts a group's maximum, marked with its chunk, among the three largest.
__device__ __forceinline__ void vq_insert(VqTop& top, float maximum, int chunk) {
  constexpr uint32_t mask = (1u << kVqChunkBits) - 1;
  const float marked =
      __uint_as_float((__float_as_uint(maximum) & ~mask) | static_cast<uint32_t>(chunk));
  top.values[2] = fmaxf(top.values[2], fminf(top.values[1], marked));
  top.values[1] = fmaxf(top.values[1], fminf(top.values[0], marked));
  top.values[0] = fmaxf(top.values[0], marked);
}

template <int kSteps>
__device__ __forceinline__ void vq_copy_stage(VqTensorStorage<kSteps>& shared, int buffer,
                                              const VqWorkspace& workspace, int stage) {
  constexpr unsigned kPieces = kSteps * 2;  // of 16 bytes, a code
  const unsigned thread = threadIdx.x;
  const int64_t first_code = static_cast<int64_t>(stage) * kVqStageCodes;
  const __half* from = workspace.codes_half + first_code * (kSteps * 16) + thread * 8;
#pragma unroll
  for (unsigned i = 0; i < kPieces; ++i) {
    const unsigned piece = thread + i * kVqTensorThreads;
    ptx::cp_async<16>(&shared.codes[buffer][piece / kPieces][piece % kPieces * 8],
                      from + i * (kVqTensorThreads * 8));
  }
  if (thread < kVqStageCodes / 2) {
    ptx::cp_async<16>(shared.starts[buffer][thread], workspace.start_of(first_code + thread * 2));
  }
  ptx::cp_async_commit();
}

// Group maxima of this warp's rows over one chunk of a stage. kUnroll: so many columns' products
// are under way at a time as registers allow.
template <int kSteps, int kFragments, int kUnroll = kFragments < 4 ? 8 : 4>
__device__ __forceinline__ void vq_score_chunk(const VqTensorStorage<kSteps>& shared, int buffer,
                                               int first_code,
                                               const uint32_t (&rows)[kFragments][kSteps][4],
                                               float (&maxima)[kFragments][2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kFragments; ++m) maxima[m][0] = maxima[m][1] = kVqAbsentScore;
  const auto* lines = &shared.codes[buffer][first_code + lane % 8];
  const auto* starts_of_pairs = &shared.starts[buffer][first_code / 2 + lane % 4];
#pragma unroll(kUnroll)
  for (int n = 0; n < kVqChunkCodes / 8; ++n) {
    uint32_t codes[kSteps][2];
    const __half* line = lines[n * 8];
#pragma unroll
    for (int k = 0; k + 1 < kSteps; k += 2) {
      uint32_t pair[4];
      ptx::ldmatrix_x4(pair, line + k * 16 + lane / 8 * 8);
      codes[k][0] = pair[0];
      codes[k][1] = pair[1];
      codes[k + 1][0] = pair[2];
      codes[k + 1][1] = pair[3];
    }
    if constexpr (kSteps % 2 == 1) {
      ptx::ldmatrix_x2(codes[kSteps - 1], line + (kSteps - 1) * 16 + lane / 8 % 2 * 8);
    }
    const float4 start = *reinterpret_cast<const float4*>(starts_of_pairs[n * 4]);
    const float starts[4] = {start.x, start.y, start.z, start.w};
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      float scores[4];
      ptx::mma_m16n8k16<__half>(scores, rows[m][0], codes[0], starts);
#pragma unroll
      for (int k = 1; k < kSteps; ++k) ptx::mma_m16n8k16<__half>(scores, rows[m][k], codes[k]);
      maxima[m][0] = fmaxf(maxima[m][0], fmaxf(scores[0], scores[1]));
      maxima[m][1] = fmaxf(maxima[m][1], fmaxf(scores[2], scores[3]));
    }
  }
}

// A block scores a run of row tiles against the codes, vq_tensor_rows(kFragments) rows at a time.
template <int kSteps, int kFragments>
__global__ void __launch_bounds__(kVqTensorThreads, kVqTensorBlocks)
    vq_score_tensor_kernel(VqProblem problem, VqWorkspace workspace) {
  ptx::griddepcontrol_launch_dependents();
  auto& shared = shared_storage<VqTensorStorage<kSteps>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  VqRun run(problem);
  int next_stage = run.stage;
  int buffer = 0;
  ptx::griddepcontrol_wait();
  vq_copy_stage<kSteps>(shared, buffer, workspace, next_stage);
  for (; run.left > 0; run.advance(problem)) {
    const VqPart part = run.part(problem);
    const int64_t warp_row = part.row_tile * vq_tensor_rows(kFragments) + warp * (kFragments * 16);
    uint32_t rows[kFragments][kSteps][4];
    VqTop tops[kFragments][2];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = warp_row + m * 16 + lane / 4 + i % 2 * 8;
        const uint32_t* line =
            reinterpret_cast<const uint32_t*>(workspace.latents_half + row * (kSteps * 16));
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          rows[m][k][i] = row < problem.num_latents ? line[k * 8 + lane % 4 + i / 2 * 4] : 0u;
        }
      }
      tops[m][0] = tops[m][1] = vq_no_top();
    }

    for (int stage = 0; stage < part.stages; ++stage) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // the stage is there, and everybody is done with the one before
      next_stage = next_stage + 1 < problem.stages ? next_stage + 1 : 0;
      if (stage + 1 < run.left) {  // in the next tile's part, perhaps
        vq_copy_stage<kSteps>(shared, buffer ^ 1, workspace, next_stage);
      }
      if (warp_row < problem.num_latents) {
#pragma unroll 1
        for (int chunk = 0; chunk < kVqChunksPerStage; ++chunk) {
          float maxima[kFragments][2];
          vq_score_chunk<kSteps, kFragments>(shared, buffer, chunk * kVqChunkCodes, rows, maxima);
#pragma unroll
          for (int m = 0; m < kFragments; ++m) {
            vq_insert(tops[m][0], maxima[m][0], stage * kVqChunksPerStage + chunk);
            vq_insert(tops[m][1], maxima[m][1], stage * kVqChunksPerStage + chunk);
          }
        }
      }
      buffer ^= 1;
    }

#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = warp_row + m * 16 + lane / 4 + half * 8;
        if (row < problem.num_latents) {
          part.store(problem, workspace, row, lane % 4, tops[m][half]);
        }
      }
    }
  }
}

}  // namespace flexvar
