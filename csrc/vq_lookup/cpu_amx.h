// Nearest codes in two passes as in cpu_kernel.h, the first on the tile unit (common/cpu_amx.h).
//
// A number x is xh + xm + a rest, both bfloat16. The scores of pass 1 are the products of the rows
// (xh, xm, xh) and (eh, eh, em), which leave out less than 2^-16 |x||e|: pass 2 decides in double
// precision among the codes of every group whose best score is within twice the error bound.
#pragma once

#include "vq_lookup/cpu_kernel.h"

namespace flexvar::amx {

constexpr int64_t kVqTile = 16;       // codes of a tile; queries of a tile
constexpr int64_t kVqBlockTiles = 8;  // tiles of a block of codes; a group is a column of it

// What pass 1 keeps of a query: the groups of codes that may hold the nearest.
struct VqCandidates {
  static constexpr int64_t kMost = 12;

  double slack;       // twice the error bound
  double best_score;  // the best of the groups that pass 2 has had, because the list was full
  int64_t best_code;
  int64_t count;
  struct {
    float score;
    int64_t group;
  } groups[kMost];
};

struct VqTiles {
  // The parts of `base` that pass 2 reads are made here, too: inverse_norms and block_norms, of
  // code tiles, and queries and query_norms. All have room for whole tiles.
  VqLookupParams base;
  char* codes;           // right panels [tiles of codes][steps]
  char* queries;         // left panels [tiles of queries][steps]
  float* negative_half;  // [codes in whole tiles]: -|e|²/2; -inf where there is no code
  // [shares of the codes][queries in whole tiles]: what a group needs to be a candidate; those.
  float* thresholds;
  VqCandidates* candidates;

  int64_t code_blocks() const {
    return (base.num_codes + kVqBlockTiles * kVqTile - 1) / (kVqBlockTiles * kVqTile);
  }
  int64_t code_tiles() const { return code_blocks() * kVqBlockTiles; }
  int64_t query_tiles() const { return (base.num_latents + kVqTile - 1) / kVqTile; }
  int64_t queries_of_tiles() const { return query_tiles() * kVqTile; }
  int64_t steps() const { return (3 * base.dim + 31) / 32; }
  // Where the depth has room, -|e|²/2 is three more products, with 1.
  bool multiplies_half() const { return 3 * base.dim + 3 <= 32 * steps(); }
};
// Longer codes have more tiles than a product takes.
constexpr int64_t kVqMaxTileDim = 16 * 32 / 3;

void vq_tiles_prepare_codes(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end);
void vq_tiles_prepare_queries(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end);
// Pass 1, of tiles of queries and blocks of codes: a share of them, all if there is but one.
void vq_tiles_score(const VqTiles& tiles, int64_t share, int64_t query_begin, int64_t query_end,
                    int64_t block_begin, int64_t block_end);
// Pass 2, over all shares.
void vq_tiles_resolve(const VqTiles& tiles, int64_t shares, int64_t query_begin, int64_t query_end);

}  // namespace flexvar::amx
