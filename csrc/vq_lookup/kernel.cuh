// The kernels of vq_lookup and the plan of their launches; see workspace.cuh for how they go
// together.
#pragma once

#include "vq_lookup/prepare.cuh"
#include "vq_lookup/resolve.cuh"
#include "vq_lookup/score_float.cuh"
#include "vq_lookup/score_tensor.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqMaxTensorSteps = 4;

// Sizes and the split of the codes over blocks: such that the last wave of blocks is not much
// emptier than the others, and with few rows every multiprocessor has work.
inline VqProblem plan_vq_lookup(int64_t num_latents, int64_t num_codes, int dim, bool normalize,
                                int multiprocessors) {
  VqProblem problem{};
  problem.num_latents = num_latents;
  problem.num_codes = num_codes;
  problem.dim = dim;
  problem.padded_dim = (dim + 7) / 8 * 8;
  const int steps = (dim + 15) / 16;
  // The fp16 bound is one for unit rows: others may leave fp16's range.
  problem.tensor_dim = normalize && steps <= kVqMaxTensorSteps ? steps * 16 : 0;
  problem.normalize = normalize;
  problem.stages = (num_codes + kVqStageCodes - 1) / kVqStageCodes;
  const int64_t rows = problem.tensor_dim > 0 ? vq_tensor_rows(steps) : kVqFloatRows;
  problem.row_tiles = (num_latents + rows - 1) / rows;

  constexpr int kBlocksPerMultiprocessor = 2;
  constexpr double kStagesOfOverhead = 1.0;  // what a block costs besides its stages
  const int64_t slots = static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
  double best_time = INFINITY;
  for (int64_t splits = 1; splits <= problem.stages && splits <= 4 * slots; ++splits) {
    const int64_t stages = (problem.stages + splits - 1) / splits;
    if (stages > kVqMaxStages) continue;
    const int64_t used = (problem.stages + stages - 1) / stages;
    const int64_t waves = (problem.row_tiles * used + slots - 1) / slots;
    const double time =
        static_cast<double>(waves) * (static_cast<double>(stages) + kStagesOfOverhead);
    if (time < best_time) {
      best_time = time;
      problem.stages_per_split = stages;
      problem.splits = used;
    }
  }
  if (problem.splits == 0) {  // an enormous codebook
    problem.stages_per_split = kVqMaxStages;
    problem.splits = (problem.stages + kVqMaxStages - 1) / kVqMaxStages;
  }
  return problem;
}

}  // namespace flexvar
