// Scores of normalised rows with fp16 tensor cores.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqTensorThreads = 128;

// Rows of a warp: as many as the registers allow, since all of them share the codes' fragments.
__host__ __device__ constexpr int vq_row_fragments(int steps) { return steps <= 2 ? 4 : 2; }
__host__ __device__ constexpr int vq_tensor_rows(int steps) {
  return kVqTensorThreads / 32 * 16 * vq_row_fragments(steps);
}

template <int kSteps>
struct VqTensorStorage {
  // 16 bytes of padding put the eight rows that ldmatrix reads at once into different banks.
  alignas(16) __half codes[2][kVqStageCodes][kSteps * 16 + 8];
  alignas(16) float negative_half[2][kVqStageCodes];
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
                                              const VqWorkspace& workspace, int64_t first_code) {
  constexpr int kPieces = kSteps * 2;  // of 16 bytes, a code
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = thread + i * kVqTensorThreads, code = piece / kPieces, part = piece % kPieces;
    ptx::cp_async<16>(&shared.codes[buffer][code][part * 8],
                      workspace.codes_half + (first_code + code) * (kSteps * 16) + part * 8);
  }
  if (thread < kVqStageCodes / 4) {
    ptx::cp_async<16>(&shared.negative_half[buffer][thread * 4],
                      workspace.negative_half + first_code + thread * 4);
  }
}

// Group maxima of this warp's rows over one chunk of a stage.
template <int kSteps, int kFragments>
__device__ __forceinline__ void vq_score_chunk(const VqTensorStorage<kSteps>& shared, int buffer,
                                               int first_code,
                                               const uint32_t (&rows)[kFragments][kSteps][4],
                                               float (&maxima)[kFragments][2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kFragments; ++m) maxima[m][0] = maxima[m][1] = kVqNoGroup;
#pragma unroll 4  // all eight spill
  for (int n = 0; n < kVqChunkCodes; n += 8) {
    uint32_t codes[kSteps][2];
    const auto* line = shared.codes[buffer][first_code + n + lane % 8];
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
    const float2 start = *reinterpret_cast<const float2*>(
        &shared.negative_half[buffer][first_code + n + lane % 4 * 2]);
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      float scores[4] = {start.x, start.y, start.x, start.y};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) ptx::mma_m16n8k16<__half>(scores, rows[m][k], codes[k]);
      maxima[m][0] = fmaxf(maxima[m][0], fmaxf(scores[0], scores[1]));
      maxima[m][1] = fmaxf(maxima[m][1], fmaxf(scores[2], scores[3]));
    }
  }
}

// A block scores vq_tensor_rows(kSteps) rows (blockIdx.x) against one split of the codes
// (blockIdx.y).
template <int kSteps>
__global__ void __launch_bounds__(kVqTensorThreads, 3)
    vq_score_tensor_kernel(VqProblem problem, VqWorkspace workspace) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  constexpr int kFragments = vq_row_fragments(kSteps);
  auto& shared = shared_storage<VqTensorStorage<kSteps>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t warp_row =
      blockIdx.x * static_cast<int64_t>(vq_tensor_rows(kSteps)) + warp * kFragments * 16;
  const bool active = warp_row < problem.num_latents;

  const int64_t first_stage = blockIdx.y * problem.stages_per_split;
  const int64_t remaining = problem.stages - first_stage;
  const int stages =
      static_cast<int>(remaining < problem.stages_per_split ? remaining : problem.stages_per_split);
  vq_copy_stage<kSteps>(shared, 0, workspace, first_stage * kVqStageCodes);
  ptx::cp_async_commit();

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
    tops[m][0] = tops[m][1] = VqTop{{kVqNoGroup, kVqNoGroup, kVqNoGroup}};
  }

  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      vq_copy_stage<kSteps>(shared, (stage + 1) % 2, workspace,
                            (first_stage + stage + 1) * kVqStageCodes);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (active) {
#pragma unroll 1
      for (int chunk = 0; chunk < kVqChunksPerStage; ++chunk) {
        float maxima[kFragments][2];
        vq_score_chunk<kSteps, kFragments>(shared, stage % 2, chunk * kVqChunkCodes, rows, maxima);
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          vq_insert(tops[m][0], maxima[m][0], stage * kVqChunksPerStage + chunk);
          vq_insert(tops[m][1], maxima[m][1], stage * kVqChunksPerStage + chunk);
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = warp_row + m * 16 + lane / 4 + half * 8;
      if (row < problem.num_latents) {
        workspace.tops[(blockIdx.y * problem.num_latents + row) * kVqSubgroups + lane % 4] =
            tops[m][half];
      }
    }
  }
}

}  // namespace flexvar
