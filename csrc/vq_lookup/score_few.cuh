// Scores of few latents with fp16 tensor cores, straight from the arguments: every block normalises
// the latents and codes that it compares, which costs less than a kernel before it.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/direct_row.cuh"
#include "vq_lookup/score_tensor.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqFewThreads = 256;  // four warps of rows, for either chunk of a stage
constexpr int kVqFewBlocks = 2;     // on a multiprocessor
// Rows of a warp, in fragments of 16: more of them share a block's normalising of codes.
__host__ __device__ constexpr int vq_few_fragments(int steps) { return steps <= 2 ? 2 : 1; }
__host__ __device__ constexpr int vq_few_rows(int steps) {
  return vq_tensor_rows(vq_few_fragments(steps));
}

struct VqScoreFewParams {
  VqProblem problem;
  VqDirectRows latents, codes;
  bool resampled;       // latents are the kernel before's, launched behind all that wrote codes
  float* group_maxima;  // [N][stages * kVqChunksPerStage][kVqSubgroups]
};

template <int kSteps>
struct VqFewStorage {
  VqTensorStorage<kSteps> stages;
  // Padded as codes are.
  alignas(16) __half latents[vq_few_rows(kSteps)][kSteps * 16 + 8];
};

// What a thread has of a stage's codes: quarters of two. None of a stage behind the last.
template <int kSteps>
class VqFewCodes {
 public:
  __device__ __forceinline__ VqFewCodes(const VqDirectRows& codes, int stage)
      : rows_{{codes, code_of(stage, 0)}, {codes, code_of(stage, 1)}},
        exist_{code_of(stage, 0) < codes.count, code_of(stage, 1) < codes.count} {}

  // Normalises them.
  __device__ __forceinline__ void store(VqTensorStorage<kSteps>& shared, int buffer) {
    float squares[2];
    vq_normalize(rows_, exist_, squares);
    const auto part = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned code = threadIdx.x / 4 + i * (kVqFewThreads / 4);
      vq_store_half(shared.codes[buffer][code], rows_[i]);
      // As matrix products have it in their sums, for either row.
      if (part < 2) {
        shared.starts[buffer][code / 2][code % 2 + part * 2] = vq_start(squares[i], exist_[i]);
      }
    }
  }

 private:
  static __device__ __forceinline__ int code_of(int stage, int i) {
    return stage * kVqStageCodes + static_cast<int>(threadIdx.x / 4) + i * (kVqFewThreads / 4);
  }
  static_assert(kVqStageCodes == kVqFewThreads / 4 * 2);
  VqQuarterRow<kSteps> rows_[2];
  bool exist_[2];
};

// Block (x, y) scores row tile y against run x of the stages.
template <int kSteps>
__global__ void __launch_bounds__(kVqFewThreads, kSteps <= 3 ? kVqFewBlocks : 1)
    vq_score_few_kernel(VqScoreFewParams params) {
  ptx::griddepcontrol_launch_dependents();
  if (!params.resampled) ptx::griddepcontrol_wait();
  auto& shared = shared_storage<VqFewStorage<kSteps>>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int run = static_cast<int>(params.problem.run);
  const int stages = static_cast<int>(params.problem.stages);
  int stage = static_cast<int>(blockIdx.x) * run;
  const int end = stage + run < stages ? stage + run : stages;
  const int first_row = static_cast<int>(blockIdx.y) * vq_few_rows(kSteps);

  // Fragment m of a warp is 64 m rows further on.
  constexpr int kFragments = vq_few_fragments(kSteps);
  constexpr int kFragmentRows = vq_tensor_rows(1);
  const int warp_row = warp % 4 * 16, chunk = warp / 4;
  const int row = first_row + warp_row + lane / 4;
  const int64_t row_length = int64_t{stages} * (kVqChunksPerStage * kVqSubgroups);
  float* out = params.group_maxima + row * row_length + chunk * kVqSubgroups + lane % 4;

  VqFewCodes<kSteps> codes(params.codes, stage);
  if (params.resampled) ptx::griddepcontrol_wait();
  {
    const int own = static_cast<int>(threadIdx.x / 4);
    VqQuarterRow<kSteps> latents[kFragments];
    bool exist[kFragments];
    float squares[kFragments];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      exist[m] = first_row + own + m * kFragmentRows < params.latents.count;
      latents[m] = VqQuarterRow<kSteps>(params.latents, first_row + own + m * kFragmentRows);
    }
    vq_normalize(latents, exist, squares);
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      vq_store_half(shared.latents[own + m * kFragmentRows], latents[m]);
    }
  }
  for (int buffer = 0; stage < end; ++stage, buffer ^= 1) {
    codes.store(shared.stages, buffer);
    __syncthreads();  // the stage is there, and everybody is done with the one before
    codes = VqFewCodes<kSteps>(params.codes, stage + 1 < end ? stage + 1 : stages);
    uint32_t rows[kFragments][kSteps][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      const auto* line = shared.latents[m * kFragmentRows + warp_row + lane % 16];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        ptx::ldmatrix_x4(rows[m][k], line + k * 16 + lane / 16 * 8);
      }
    }
    float maxima[kFragments][2];
    vq_score_chunk<kSteps, kFragments, 4>(shared.stages, buffer, chunk * kVqChunkCodes, rows,
                                          maxima);
    float* groups = out + stage * (kVqChunksPerStage * kVqSubgroups);
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int further = m * kFragmentRows + half * 8;
        if (row + further < params.latents.count) groups[further * row_length] = maxima[m][half];
      }
    }
  }
}

}  // namespace flexvar
