// What the paths have in common that find, while they score, which codes may be the nearest: codes
// in tiles, a tile to a vector, and blocks of such tiles. The codes of a lane of a block form a
// group: they are neighbours in the codebook.
#pragma once

#include "vq_lookup/cpu_kernel.h"

namespace flexvar {

constexpr int64_t kVqMostCodesOfTiles = INT32_MAX;  // so that candidates are small

// What pass 1 keeps of a query: the groups of codes that may hold the nearest. A line of the cache.
template <typename Score>
struct alignas(64) VqCandidates {
  static constexpr int32_t kMost = 4;

  double slack;       // twice the error bound
  double best_score;  // the best of the groups that pass 2 has had, because the list was full
  int64_t best_code;
  struct {
    Score score;
    int32_t group;
  } groups[kMost];
  int32_t count;
};
static_assert(sizeof(VqCandidates<float>) == 64 && sizeof(VqCandidates<int32_t>) == 64);

// Tiles of queries that a worker scores with some of the codes, for which it has lists of its own.
struct VqQueries {
  int64_t worker, share, begin, end;
};

template <typename ScoreOf, int64_t kCodes, int64_t kQueries, int64_t kTiles>
struct VqTiling {
  using Score = ScoreOf;
  static constexpr int64_t kTileCodes = kCodes;
  static constexpr int64_t kTileQueries = kQueries;
  static constexpr int64_t kBlockTiles = kTiles;
  static constexpr int64_t kBlockCodes = kTiles * kCodes;

  // Its queries and query_norms, which pass 2 reads, are made here, too, with room for whole tiles.
  VqLookupParams base;
  char* queries;  // [tiles of queries][query_tile_bytes]
  // [shares][queries in whole tiles]: what a group needs to be a candidate; those.
  Score* thresholds;
  VqCandidates<Score>* candidates;

  int64_t code_blocks() const { return (base.num_codes + kBlockCodes - 1) / kBlockCodes; }
  int64_t code_tiles() const { return code_blocks() * kBlockTiles; }
  int64_t query_tiles() const { return (base.num_latents + kTileQueries - 1) / kTileQueries; }
  int64_t queries_of_tiles() const { return query_tiles() * kTileQueries; }
};

}  // namespace flexvar
