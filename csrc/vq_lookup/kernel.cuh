// The kernels of vq_lookup and the plan of their launches; see workspace.cuh for how they go
// together.
#pragma once

#include <algorithm>

#include "vq_lookup/prepare.cuh"
#include "vq_lookup/resample.cuh"
#include "vq_lookup/resolve.cuh"
#include "vq_lookup/resolve_few.cuh"
#include "vq_lookup/score_few.cuh"
#include "vq_lookup/score_float.cuh"
#include "vq_lookup/score_tensor.cuh"
#include "vq_lookup/score_warpgroup.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

// With fewer (tile, stage) pairs of large tiles to a multiprocessor, tiles are small: each row then
// has fewer parts to be looked through afterwards.
constexpr int64_t kVqFewPairs = 12;
// Of the tiles of warpgroups, which take less time.
constexpr int64_t kVqFewPairsOfWarpgroups = 8;

// With more pairs of 64 latents and a stage to a multiprocessor, codes are not normalised anew for
// every tile.
constexpr int64_t kVqFewPairsOfFewLatents = 12;

// Sizes and the run of a block: such that all blocks are on the device at once and end together.
inline VqProblem plan_vq_lookup(int64_t num_latents, int64_t num_codes, int dim, bool normalize,
                                bool can_be_direct, bool has_warpgroups, int multiprocessors) {
  VqProblem problem{};
  problem.num_latents = num_latents;
  problem.num_codes = num_codes;
  problem.dim = dim;
  problem.padded_dim = (dim + 7) / 8 * 8;
  const int steps = (dim + 15) / 16;
  // The fp16 bound is one for unit rows: others may leave fp16's range.
  problem.tensor_dim = normalize && steps <= kVqMaxTensorSteps ? steps * 16 : 0;
  problem.normalize = normalize;
  problem.stages = divide_up(num_codes, kVqStageCodes);

  const auto set_tiles = [&](int64_t rows) {
    problem.tile_rows = static_cast<int>(rows);
    problem.row_tiles = divide_up(num_latents, rows);
    return problem.row_tiles * problem.stages;
  };
  int64_t pairs = set_tiles(vq_tensor_rows(1));
  problem.few =
      can_be_direct && problem.tensor_dim > 0 && pairs <= kVqFewPairsOfFewLatents * multiprocessors;
  if (problem.few) {
    set_tiles(vq_few_rows(steps));
    const int64_t blocks = static_cast<int64_t>(multiprocessors) * kVqFewBlocks;
    problem.run = divide_up(problem.stages, std::max<int64_t>(blocks / problem.row_tiles, 1));
    problem.parts = divide_up(problem.stages, problem.run);
    return problem;
  }
  int64_t blocks = static_cast<int64_t>(multiprocessors) * 2;
  if (problem.tensor_dim == 0) {
    pairs = set_tiles(kVqFloatRows);
  } else if (pairs = set_tiles(kVqWarpgroupRows);
             has_warpgroups && steps <= kVqWarpgroupMaxSteps &&
             pairs >= kVqFewPairsOfWarpgroups * multiprocessors) {
    problem.by_warpgroups = true;
    blocks = static_cast<int64_t>(multiprocessors) * kVqWarpgroupBlocks;
  } else if (pairs = set_tiles(vq_tensor_rows(vq_row_fragments(steps)));
             pairs >= kVqFewPairs * multiprocessors) {
    blocks = static_cast<int64_t>(multiprocessors) * kVqTensorBlocks;
  } else {
    pairs = set_tiles(vq_tensor_rows(1));
  }
  problem.run = divide_up(pairs, blocks);
  if (problem.stages > kVqMaxStages && problem.run > kVqMaxStages) problem.run = kVqMaxStages;
  problem.parts = divide_up(problem.stages - 1, problem.run) + 1;
  return problem;
}

}  // namespace flexvar
