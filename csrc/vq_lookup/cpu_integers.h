// Nearest codes of unit vectors in two passes as in cpu_kernel.h, the first in 16-bit integers:
// AVX2 and AVX512-VNNI multiply twice as many of them as floats.
//
// A component x in [-1, 1] is the integer nearest to kVqUnit x. Sums of their products are exact in
// 32 bits: by Cauchy and Schwarz they are hardly more than kVqUnit², and -|e|²/2 adds half of that.
// So a score errs by the components' rounding and by that of the unit vectors (cpu_units.h) alone,
// which have bounds.
//
// Pass 1 makes a block of codes where it scores it: the integers, 8 or 16 KiB at 32 components,
// stay in the caches of its core.
#pragma once

#include "vq_lookup/cpu_tiles.h"

namespace flexvar {

constexpr int64_t kVqUnit = 32766;  // that 1 and a rounding fit into 16 bits
constexpr int64_t kVqMostDimOfIntegers = 512;

template <int64_t kCodes, int64_t kQueries>
struct VqIntegerTiles : VqTiling<int32_t, kCodes, kQueries, 16> {
  using Tiling = VqTiling<int32_t, kCodes, kQueries, 16>;
  using Tiling::base;
  static constexpr int64_t kFewestQueryTilesOfShare = 128;  // so that making codes is little work

  char* code_blocks_of_workers;  // [workers][code_block_bytes]

  int64_t pairs() const { return base.padded_dim() / 2; }
  int64_t code_tile_bytes() const { return pairs() * kCodes * 4; }  // [pair of components][code]
  int64_t code_block_bytes() const { return Tiling::kBlockTiles * code_tile_bytes(); }
  int64_t query_tile_bytes() const { return kQueries * pairs() * 4; }  // [pair][query]
};

// Pass 1 (the lists are empty; blocks of codes are scored), and pass 2, over all shares.
#define FLEXVAR_DECLARE_INTEGER_TILES(isa, tile_codes, tile_queries)                         \
  namespace isa {                                                                            \
  struct VqTiles : VqIntegerTiles<tile_codes, tile_queries> {};                              \
  void vq_tiles_prepare_queries(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end); \
  void vq_tiles_start(const VqTiles& tiles, const VqQueries& queries);                       \
  void vq_tiles_score(const VqTiles& tiles, const VqQueries& queries, int64_t block_begin,   \
                      int64_t block_end);                                                    \
  void vq_tiles_resolve(const VqTiles& tiles, int64_t shares, int64_t query_begin,           \
                        int64_t query_end);                                                  \
  }
FLEXVAR_DECLARE_INTEGER_TILES(avx2, 8, 6)
FLEXVAR_DECLARE_INTEGER_TILES(avx512vnni, 16, 8)

}  // namespace flexvar
