// Nearest codes on a GPU, in three kernels, or two for few latents, behind one that resamples
// latents for a pyramid of scales:
//
//   resample a row of latents for every token
//   prepare  normalises codes and latents
//   score    the score x·e - |e|²/2 of every pair, with tensor cores or in fp32, of which it keeps
//            the three largest maxima over groups of 16 codes: no [N, V] matrix is written
//   resolve  scores once more the codes of every group whose maximum lies within twice the error
//            bound of the row's maximum (nearly always one group), and where more than one code
//            does, those in double precision; rows that may have many, block by block
//
// Few latents: the score kernel itself normalises the latents and codes that it compares, in fp32,
// which the error bound allows for, and writes the maxima of all groups; a kernel of its own
// resolves these, with rows as they are in the arguments, which must be readable in fours. Many
// latents took longer that way.
//
// The nearest code is in one of these groups, so the result depends neither on the score kernel nor
// on how its work is split, and equals the CPU's.
#pragma once

#include "common/cuda.cuh"
#include "common/divide_up.h"

namespace flexvar {

// A group is 16 of the 64 codes of a chunk: subgroup t holds those whose column modulo 8 is 2t or
// 2t + 1, which are the columns that one thread of a warp gets from the matrix products.
constexpr int kVqChunkCodes = 64;
constexpr int kVqSubgroups = 4;
// Code i of a group, counted from its first.
__device__ __forceinline__ int vq_code_of_group(int i) { return i / 2 * 8 + i % 2; }
// Of 16 components: the most that the tensor cores' kernels are compiled for.
constexpr int kVqMaxTensorSteps = 4;
// Codes are padded to whole stages; a stage is what the score kernels copy to shared memory at
// once.
constexpr int kVqStageCodes = 128;
constexpr int kVqChunksPerStage = kVqStageCodes / kVqChunkCodes;
// A group's maximum carries the number of its chunk, counted from its part's first, in its lowest
// bits. So a part may have at most this many chunks.
constexpr int kVqChunkBits = 8;
constexpr int kVqMaxStages = (1 << kVqChunkBits) / kVqChunksPerStage;
// Below every score of a finite code whose row takes part, and below every group's maximum.
constexpr float kVqAbsentScore = -1e30f;
constexpr float kVqNoGroup = -3e38f;
constexpr double kVqLargestMagnitude = 1e28;

// The three largest packed maxima of a subgroup in a part of the codes, largest first, and which
// part that is: its first stage, times 256, plus its stages.
struct alignas(16) VqTop {
  float values[3];
  unsigned part;
};
static_assert(kVqMaxStages < 256);

__device__ __forceinline__ VqTop vq_no_top() { return {{kVqNoGroup, kVqNoGroup, kVqNoGroup}, 0}; }

struct VqWorkspace {
  float* codes;        // [V padded][padded_dim]: as compared; zero where padded or not finite
  float* latents;      // [N][padded_dim]: likewise
  double* half_norms;  // [V padded]: |e|²/2; infinity where padded or not finite
  // [V padded / 2][4]: what the sum of a score begins with, -|e|²/2 of two codes, twice, as matrix
  // products have it; kVqAbsentScore where padded or not finite.
  float* starts;
  // [N]: |x|, or 1 if normalised; NaN for a row that holds a NaN or an infinity.
  double* latent_norms;
  float* max_code_norm;  // [1]: at least the largest |e|, unless normalised
  __half* codes_half;    // [V padded][tensor_dim]: for the tensor cores, else null
  __half* latents_half;  // [N][tensor_dim]: likewise
  VqTop* tops;           // [N][parts][kVqSubgroups]

  __device__ __forceinline__ float* start_of(int64_t code) const {
    return starts + (code * 2 - (code & 1));
  }
};

struct VqProblem {
  int64_t num_latents;
  int64_t num_codes;
  int dim;
  int padded_dim;  // a multiple of 8
  int tensor_dim;  // a multiple of 16; 0: scores in fp32
  bool normalize;
  bool few;            // latents: two kernels; tensor_dim > 0
  bool by_warpgroups;  // scores
  int64_t stages;      // of codes
  int tile_rows;       // rows that a block of a score kernel has at a time
  int64_t row_tiles;
  int64_t run;    // scored by a block: (tile, stage) pairs, all stages of a tile in a row
  int64_t parts;  // the most blocks that share a tile, each scoring a part of its stages; the
                  // last of them writes vq_no_top() for those that the tile does not have

  __host__ __device__ int64_t padded_codes() const { return stages * kVqStageCodes; }
  __host__ __device__ int64_t blocks() const { return divide_up(row_tiles * stages, run); }
};

// The part of a row tile that a block scores.
struct VqPart {
  int64_t row_tile;
  int number;  // among the tile's
  int first_stage, stages;

  __device__ __forceinline__ void store(const VqProblem& problem, const VqWorkspace& workspace,
                                        int64_t row, int subgroup, VqTop top) const {
    VqTop* tops = workspace.tops + row * problem.parts * kVqSubgroups + subgroup;
    top.part = static_cast<unsigned>(first_stage) << 8 | static_cast<unsigned>(stages);
    tops[number * kVqSubgroups] = top;
    const bool last = first_stage + stages == problem.stages;
    for (int none = number + 1; last && none < problem.parts; ++none) {
      tops[none * kVqSubgroups] = vq_no_top();
    }
  }
};

// The parts of block blockIdx.x, one after the other:
//   for (VqRun run(problem); run.left > 0; run.advance(problem)) … run.part(problem)
struct VqRun {
  int64_t left;  // pairs
  int64_t row_tile;
  int number, stage;

  __device__ __forceinline__ explicit VqRun(const VqProblem& problem) {
    const int64_t first = blockIdx.x * problem.run;
    const int64_t behind = problem.row_tiles * problem.stages - first;
    left = behind < problem.run ? behind : problem.run;
    row_tile = first / problem.stages;
    number = static_cast<int>(blockIdx.x - row_tile * problem.stages / problem.run);
    stage = static_cast<int>(first - row_tile * problem.stages);
  }
  __device__ __forceinline__ VqPart part(const VqProblem& problem) const {
    const int64_t rest = problem.stages - stage;
    return {row_tile, number, stage, static_cast<int>(left < rest ? left : rest)};
  }
  __device__ __forceinline__ void advance(const VqProblem& problem) {
    left -= part(problem).stages;
    ++row_tile;
    number = stage = 0;
  }
};

}  // namespace flexvar
