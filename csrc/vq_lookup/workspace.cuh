// Nearest codes on a GPU, in three kernels:
//
//   prepare  normalises codes and latents (after resampling them, for a pyramid of scales)
//   score    the score x·e - |e|²/2 of every pair, with tensor cores or in fp32, of which it keeps
//            the three largest maxima over groups of 16 codes: no [N, V] matrix is written
//   resolve  scores in double precision the codes of every group whose maximum lies within twice
//            the error bound of the row's maximum (nearly always one group), and picks the best
//
// The nearest code is in one of these groups, so the result depends neither on the score kernel nor
// on how its work is split, and equals the CPU's.
#pragma once

#include "common/cuda.cuh"

namespace flexvar {

// A group is 16 of the 64 codes of a chunk: subgroup t holds those whose column modulo 8 is 2t or
// 2t + 1, which are the columns that one thread of a warp gets from the matrix products.
constexpr int kVqChunkCodes = 64;
constexpr int kVqSubgroups = 4;
// Codes are padded to whole stages; a stage is what the score kernels copy to shared memory at
// once.
constexpr int kVqStageCodes = 128;
constexpr int kVqChunksPerStage = kVqStageCodes / kVqChunkCodes;
// A group's maximum carries the number of its chunk, counted from the block's first, in its lowest
// bits. So a block may look through at most this many chunks.
constexpr int kVqChunkBits = 8;
constexpr int kVqMaxStages = (1 << kVqChunkBits) / kVqChunksPerStage;
// Below every score of a finite code whose row takes part, and below every group's maximum.
constexpr float kVqAbsentScore = -1e30f;
constexpr float kVqNoGroup = -3e38f;
constexpr double kVqLargestMagnitude = 1e28;

// The three largest packed maxima of a subgroup, largest first.
struct VqTop {
  float values[3];
};

struct VqWorkspace {
  float* codes;          // [V padded][padded_dim]: as compared; zero where padded or not finite
  float* latents;        // [N][padded_dim]: likewise
  double* half_norms;    // [V padded]: |e|²/2; infinity where padded or not finite
  float* negative_half;  // [V padded]: -|e|²/2; kVqAbsentScore where padded or not finite
  double* latent_norms;  // [N]: |x|; NaN for a row that holds a NaN or an infinity
  float* max_code_norm;  // [1]: at least the largest |e|, unless normalised
  __half* codes_half;    // [V padded][tensor_dim]: for the tensor cores, else null
  __half* latents_half;  // [N][tensor_dim]: likewise
  VqTop* tops;           // [splits][N][kVqSubgroups]
};

struct VqProblem {
  int64_t num_latents;
  int64_t num_codes;
  int dim;
  int padded_dim;  // a multiple of 8
  int tensor_dim;  // a multiple of 16; 0: scores in fp32
  bool normalize;
  int64_t stages;            // of codes, all blocks together
  int64_t stages_per_split;  // at most kVqMaxStages
  int64_t splits;
  int64_t row_tiles;

  __host__ __device__ int64_t padded_codes() const { return stages * kVqStageCodes; }
};

}  // namespace flexvar
