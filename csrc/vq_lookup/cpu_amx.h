// Nearest codes in two passes as in cpu_kernel.h, the first on the tile unit (common/cpu_amx.h):
// for vectors of any length, as those of length 1 are found sooner in integers (cpu_integers.h).
//
// A number x is xh + xm + a rest, both bfloat16. The scores of pass 1 are the products of the rows
// (xh, xm, xh) and (eh, eh, em), which leave out less than 2^-16 |x||e|: pass 2 decides in double
// precision among the codes of every group whose best score is within twice the error bound.
#pragma once

#include "vq_lookup/cpu_tiles.h"

namespace flexvar::amx {

struct VqTiles : VqTiling<float, 16, 16, 8> {
  char* codes;           // [tiles of codes][code_tile_bytes]
  float* negative_half;  // [codes in whole tiles]: -|e|²/2; -inf where there is no code
  double* tile_norms;    // [tiles of codes]: the largest |e| of each
  double max_code_norm;  // of all

  static constexpr int64_t kMaxDim =
      16 * 32 / 3;  // longer codes have more tiles than a product takes
  // For fewer, the codes are not worth laying out in tiles.
  static constexpr int64_t kFewestLatents = 128;
  static constexpr int64_t kFewestQueryTilesOfShare = 2;

  int64_t steps() const { return (3 * base.dim + 31) / 32; }
  int64_t code_tile_bytes() const { return steps() * 1024; }   // right panels
  int64_t query_tile_bytes() const { return steps() * 1024; }  // left panels
  // Where the depth has room, -|e|²/2 is three more products, with 1.
  bool multiplies_half() const { return 3 * base.dim + 3 <= 32 * steps(); }
};

void vq_tiles_prepare_codes(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end);
void vq_tiles_prepare_queries(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end);
// Pass 1: the lists are empty; blocks of codes are scored.
void vq_tiles_start(const VqTiles& tiles, const VqQueries& queries);
void vq_tiles_score(const VqTiles& tiles, const VqQueries& queries, int64_t block_begin,
                    int64_t block_end);
// Pass 2, over all shares.
void vq_tiles_resolve(const VqTiles& tiles, int64_t shares, int64_t query_begin, int64_t query_end);

}  // namespace flexvar::amx
