// Scores in fp32, for codes of any length and any number of components.
#pragma once

#include "vq_lookup/score_tensor.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqFloatThreads = 256;
constexpr int kVqFloatRows = 128;  // 16 x 8: a thread has eight rows and four codes of a chunk
constexpr int kVqFloatSlab = 32;   // components in shared memory at a time

struct VqFloatStorage {
  alignas(16) float latents[kVqFloatSlab][kVqFloatRows + 4];
  alignas(16) float codes[kVqFloatSlab][kVqChunkCodes + 4];
};

// `count` rows from `first` on, transposed; zero behind the last of `limit` rows and the dim.
template <int kCount>
__device__ __forceinline__ void vq_load_slab(float (&slab)[kVqFloatSlab][kCount + 4],
                                             const float* rows, int64_t first, int64_t limit,
                                             int padded_dim, int first_component) {
  for (int i = static_cast<int>(threadIdx.x); i < kCount * kVqFloatSlab; i += kVqFloatThreads) {
    const int row = i / kVqFloatSlab, k = i % kVqFloatSlab;
    const bool inside = first + row < limit && first_component + k < padded_dim;
    slab[k][row] = inside ? rows[(first + row) * padded_dim + first_component + k] : 0.0f;
  }
}

// Scores kVqFloatRows rows against one part of the codes.
__device__ __forceinline__ void vq_score_part(VqFloatStorage& shared, const VqProblem& problem,
                                              const VqWorkspace& workspace, const VqPart& part) {
  const int lane_code = static_cast<int>(threadIdx.x) % 16;  // codes 2i, 2i + 1, 2i + 32, 2i + 33
  const int lane_row = static_cast<int>(threadIdx.x) / 16;   // rows 8i … 8i + 7
  const int64_t first_row = part.row_tile * kVqFloatRows;
  const int64_t first_code = static_cast<int64_t>(part.first_stage) * kVqStageCodes;
  const int chunks = part.stages * kVqChunksPerStage;
  const int64_t end_code = first_code + chunks * kVqChunkCodes;
  const bool one_slab = problem.padded_dim <= kVqFloatSlab;

  VqTop tops[8];
#pragma unroll
  for (int r = 0; r < 8; ++r) tops[r] = vq_no_top();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int64_t chunk_code = first_code + chunk * kVqChunkCodes;
    float scores[8][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float start = *workspace.start_of(chunk_code + lane_code * 2 + j % 2 + j / 2 * 32);
#pragma unroll
      for (int r = 0; r < 8; ++r) scores[r][j] = start;
    }
    for (int slab = 0; slab < problem.padded_dim; slab += kVqFloatSlab) {
      __syncthreads();  // everybody is done with the slabs before
      if (!one_slab || chunk == 0) {
        vq_load_slab<kVqFloatRows>(shared.latents, workspace.latents, first_row,
                                   problem.num_latents, problem.padded_dim, slab);
      }
      vq_load_slab<kVqChunkCodes>(shared.codes, workspace.codes, chunk_code, end_code,
                                  problem.padded_dim, slab);
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kVqFloatSlab; ++k) {
        float x[8], e[4];
#pragma unroll
        for (int r = 0; r < 8; r += 4) {
          const float4 four =
              *reinterpret_cast<const float4*>(&shared.latents[k][lane_row * 8 + r]);
          x[r] = four.x;
          x[r + 1] = four.y;
          x[r + 2] = four.z;
          x[r + 3] = four.w;
        }
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const float2 two =
              *reinterpret_cast<const float2*>(&shared.codes[k][lane_code * 2 + j * 16]);
          e[j] = two.x;
          e[j + 1] = two.y;
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) {
#pragma unroll
          for (int j = 0; j < 4; ++j) scores[r][j] = fmaf(x[r], e[j], scores[r][j]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      float maximum = fmaxf(fmaxf(scores[r][0], scores[r][1]), fmaxf(scores[r][2], scores[r][3]));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 4));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 8));
      vq_insert(tops[r], maximum, chunk);
    }
  }
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int64_t row = first_row + lane_row * 8 + r;
    if (lane_code < kVqSubgroups && row < problem.num_latents) {
      part.store(problem, workspace, row, lane_code, tops[r]);
    }
  }
}

__global__ void __launch_bounds__(kVqFloatThreads)
    vq_score_float_kernel(VqProblem problem, VqWorkspace workspace) {
  ptx::griddepcontrol_launch_dependents();
  auto& shared = shared_storage<VqFloatStorage>();
  VqRun run(problem);
  ptx::griddepcontrol_wait();
  for (; run.left > 0; run.advance(problem)) {
    vq_score_part(shared, problem, workspace, run.part(problem));
  }
}

}  // namespace flexvar
