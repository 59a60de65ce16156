// What the paths have in common that find, while they score, which codes may be the nearest: codes
// in tiles of 16, a tile to a vector, and blocks of such tiles. The codes of a lane of a block form
// a group.
#pragma once

#include "vq_lookup/cpu_kernel.h"

namespace flexvar {

constexpr int64_t kVqTile = 16;  // codes of a tile

// What pass 1 keeps of a query: the groups of codes that may hold the nearest.
template <typename Score>
struct VqCandidates {
  static constexpr int64_t kMost = 12;

  double slack;       // twice the error bound
  double best_score;  // the best of the groups that pass 2 has had, because the list was full
  int64_t best_code;
  int64_t count;
  struct {
    Score score;
    int64_t group;
  } groups[kMost];
};

template <typename ScoreOf, int64_t kQueries, int64_t kTiles>
struct VqTiling {
  using Score = ScoreOf;
  static constexpr int64_t kTileQueries = kQueries;
  static constexpr int64_t kBlockTiles = kTiles;

  // The parts of `base` that pass 2 reads are made here, too: inverse_norms and block_norms, of
  // code tiles, and queries and query_norms. All have room for whole tiles.
  VqLookupParams base;
  char* codes;           // [tiles of codes][code_tile_bytes]
  char* queries;         // [tiles of queries][query_tile_bytes]
  Score* negative_half;  // [codes in whole tiles]: -|e|²/2; the least score where there is no code
  // [shares of the codes][queries in whole tiles]: what a group needs to be a candidate; those.
  Score* thresholds;
  VqCandidates<Score>* candidates;

  int64_t code_blocks() const {
    return (base.num_codes + kBlockTiles * kVqTile - 1) / (kBlockTiles * kVqTile);
  }
  int64_t code_tiles() const { return code_blocks() * kBlockTiles; }
  int64_t query_tiles() const { return (base.num_latents + kTileQueries - 1) / kTileQueries; }
  int64_t queries_of_tiles() const { return query_tiles() * kTileQueries; }
};

}  // namespace flexvar
