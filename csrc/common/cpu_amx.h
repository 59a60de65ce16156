// Matrix products on the tile unit of x86 CPUs that have one (AMX), for csrc/<op>/cpu_amx.cpp.
//
// The unit multiplies bfloat16 and sums in float32. A float32 factor is the sum of three bfloat16
// numbers, exactly. Of the nine products of such sums the six largest are made; the others are at
// most 2^-22 of the whole, of either sign and mostly far smaller, so that float32 keeps its
// accuracy.
//
// A panel is a factor laid out in tiles: for each 16 of its rows, for each 32 of the depth, for
// each of the kParts parts of a number (most significant first) one tile of 1 KiB.
#pragma once

#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileBytes = 1024;

// The tile unit is configured while this lives: eight tiles of 16 rows of 64 bytes.
struct TileScope {
  TileScope() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int kParts>
struct TileVectors {
  __m512i part[kParts];
};

// 32 numbers of the depth as one vector of bfloat16 a part. Their order in the vector depends on
// kParts alone, and so is the same for both factors.
template <int kParts>
static inline __attribute__((always_inline)) TileVectors<kParts> split(Vector<float> low,
                                                                       Vector<float> high) {
  if constexpr (kParts == 1) return {{(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low)}};
  // The first part is cut off, the second rounded half up, both in the magnitude's bits. What is
  // left over is exact, and the last part takes all of it. A NaN ends up in the last part at the
  // latest; an infinity leaves a NaN.
  TileVectors<kParts> result;
  Bits32 bits[2] = {(Bits32)low, (Bits32)high};
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) {
    result.part[i] = _mm512_mask_mov_epi16((__m512i)bits[1], 0x55555555, (__m512i)(bits[0] >> 16));
#pragma GCC unroll 2
    for (int j = 0; j < 2 && i + 1 < kParts; ++j) {
      Vector<float>& left = j == 0 ? low : high;
      left -= (Vector<float>)(bits[j] & 0xffff0000);
      bits[j] = (Bits32)left + (i == 0 ? 0x8000 : 0);
    }
  }
  return result;
}
template <int kParts, typename T>
static inline __attribute__((always_inline)) TileVectors<kParts> load_tile_vectors(const T* p) {
  if constexpr (kParts == 1 && __is_same(T, Bfloat16)) return {{_mm512_loadu_si512(p)}};
  return split<kParts>(load(p), load(p + 16));
}
// The same for the last numbers of the depth: those from `count` < 32 on are zero.
template <int kParts, typename T>
static TileVectors<kParts> load_last_tile_vectors(const T* p, int64_t count) {
  T numbers[kTileDepth] = {};
  for (int64_t i = 0; i < count; ++i) numbers[i] = p[i];
  return load_tile_vectors<kParts>(numbers);
}
template <int kParts>
static inline void store_tile_vectors(char* place, const TileVectors<kParts>& vectors) {
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    _mm512_store_si512(place + part * kTileBytes, vectors.part[part]);
  }
}

// The left factor's panel: row i of a tile is a row, 32 numbers of the depth. `rows` of the 16 are
// there; the others repeat the last. Row i stands at p + i * stride; with `ahead`, what lies so
// many numbers behind it is asked for on the way.
template <int kParts, typename T>
static void pack_left_panel(char* panel, const T* p, int64_t stride, int64_t rows, int64_t depth,
                            int64_t ahead = 0) {
  constexpr int64_t kNumbersInLine = 64 / sizeof(T);
  const int64_t whole = depth / kTileDepth * kTileDepth;
  for (int64_t i = 0; i < kTileRows; ++i) {
    const T* const row = p + (i < rows ? i : rows - 1) * stride;
    char* place = panel + i * 64;
    for (int64_t k = 0; k < whole; k += kTileDepth, place += kParts * kTileBytes) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < kTileDepth && ahead != 0; j += kNumbersInLine) {
        __builtin_prefetch(row + ahead + k + j, 0, 2);
      }
      store_tile_vectors(place, load_tile_vectors<kParts>(row + k));
    }
    if (whole < depth) {
      store_tile_vectors(place, load_last_tile_vectors<kParts>(row + whole, depth - whole));
    }
  }
}

// The right factor's panel from its transpose: column j of a tile is a row, the numbers of the
// depth in pairs. `rows` of the 16 are there; the others are zero.
template <int kParts, typename T>
static void pack_right_panel(char* panel, const T* p, int64_t stride, int64_t rows, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    Vector<float> square[kParts][kTileRows];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileRows; ++i) {
      TileVectors<kParts> vectors{};
      const T* const place = p + i * stride + k;
      if (i < rows) {
        vectors = depth - k >= kTileDepth ? load_tile_vectors<kParts>(place)
                                          : load_last_tile_vectors<kParts>(place, depth - k);
      }
#pragma GCC unroll 3
      for (int part = 0; part < kParts; ++part) {
        square[part][i] = (Vector<float>)vectors.part[part];
      }
    }
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part, panel += kTileBytes) {
      transpose<float>(square[part]);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTileRows; ++i) {
        _mm512_store_si512(panel + i * 64, (__m512i)square[part][i]);
      }
    }
  }
}

// What else is done while the unit multiplies: a share at each product.
struct NothingAhead {
  void begin_step() {}
  void advance() {}
};

// Two left factors by tiles, wherever they stand: part p of tile s of the depth of factor i begins
// at tile[i] + step[s] + p * part, its rows `row` bytes apart.
struct LeftTiles {
  const char* tile[2];
  const int64_t* step;
  int64_t part = kTileBytes, row = 64;
};
// The steps of a left panel.
template <int kParts>
constexpr int64_t kPanelSteps[16] = {0,
                                     1 * kParts * kTileBytes,
                                     2 * kParts * kTileBytes,
                                     3 * kParts * kTileBytes,
                                     4 * kParts * kTileBytes,
                                     5 * kParts * kTileBytes,
                                     6 * kParts * kTileBytes,
                                     7 * kParts * kTileBytes,
                                     8 * kParts * kTileBytes,
                                     9 * kParts * kTileBytes,
                                     10 * kParts * kTileBytes,
                                     11 * kParts * kTileBytes,
                                     12 * kParts * kTileBytes,
                                     13 * kParts * kTileBytes,
                                     14 * kParts * kTileBytes,
                                     15 * kParts * kTileBytes};

// Results, the first `count`. Denormal bfloat16 numbers become zero, as they do in products.
template <typename T>
static inline void store_result(T* p, Vector<float> v, int64_t count) {
  if constexpr (__is_same(T, Bfloat16)) {
    if (count >= kFloatLanes) {
      _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
      return;
    }
  }
  store_first(p, v, count);
}

#define FLEXVAR_LOAD_LEFT(p)                                       \
  _tile_loadd(4, left.tile[0] + step + (p) * left.part, left.row); \
  _tile_loadd(5, left.tile[1] + step + (p) * left.part, left.row);
#define FLEXVAR_LOAD_RIGHT(p)                          \
  _tile_loadd(6, right[0] + k + (p) * kTileBytes, 64); \
  if constexpr (kColumns == 2) _tile_loadd(7, right[1] + k + (p) * kTileBytes, 64);
#define FLEXVAR_MULTIPLY                                \
  ahead.advance();                                      \
  _tile_dpbf16ps(0, 4, 6);                              \
  _tile_dpbf16ps(2, 5, 6);                              \
  if constexpr (kColumns == 2) _tile_dpbf16ps(1, 4, 7); \
  if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);

// Products of parts that a step of the depth takes; a share of what is ahead is done at each.
template <int kParts>
constexpr int64_t kProductsOfStep = kParts == 1 ? 1 : 6;

// Tiles of the depth that a linear layer takes at a time: two panels of so many stay in the L1
// cache. In float32 it also bounds the length of a chain of sums. They are added up outside of the
// unit: one long chain would lose what the parts keep.
template <int kParts>
constexpr int64_t kTileSteps = kParts == 1 ? 8 : 4;

// sums (+)= left right for the two left factors and kColumns right panels over `steps` tiles of the
// depth, few enough for one chain of sums. sums[i][j] is 1 KiB, row-major.
template <int kParts, int kColumns, typename Ahead>
static __attribute__((noinline)) void multiply_tiles(const LeftTiles& left,
                                                     const char* const (&right)[2],
                                                     float* const (&sums)[2][2], int64_t steps,
                                                     bool accumulate, Ahead& ahead) {
  constexpr bool kAddsOutside = kParts > 1;
  alignas(64) float chain[2][2][256];
  asm volatile("" ::: "memory");  // the tile instructions do not tell the compiler what they read
  if (accumulate && !kAddsOutside) {
    _tile_loadd(0, sums[0][0], 64);
    _tile_loadd(2, sums[1][0], 64);
    if constexpr (kColumns == 2) _tile_loadd(1, sums[0][1], 64);
    if constexpr (kColumns == 2) _tile_loadd(3, sums[1][1], 64);
  } else {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (kColumns == 2) _tile_zero(1);
    if constexpr (kColumns == 2) _tile_zero(3);
  }
  for (int64_t s = 0, k = 0; s < steps; ++s, k += kParts * kTileBytes) {
    const int64_t step = left.step[s];
    ahead.begin_step();
    asm volatile("" ::: "memory");  // what was packed ahead is there
    if constexpr (kParts == 1) {
      FLEXVAR_LOAD_LEFT(0)
      FLEXVAR_LOAD_RIGHT(0)
      FLEXVAR_MULTIPLY
    } else {
      // Every pair of parts whose product counts, one factor's tiles changing at a time.
      FLEXVAR_LOAD_LEFT(2)
      FLEXVAR_LOAD_RIGHT(0)
      FLEXVAR_MULTIPLY
      FLEXVAR_LOAD_LEFT(1)
      FLEXVAR_MULTIPLY
      FLEXVAR_LOAD_RIGHT(1)
      FLEXVAR_MULTIPLY
      FLEXVAR_LOAD_LEFT(0)
      FLEXVAR_MULTIPLY
      FLEXVAR_LOAD_RIGHT(2)
      FLEXVAR_MULTIPLY
      FLEXVAR_LOAD_RIGHT(0)
      FLEXVAR_MULTIPLY
    }
  }
  const bool adds = accumulate && kAddsOutside;
  float* const out[2][2] = {{adds ? chain[0][0] : sums[0][0], adds ? chain[0][1] : sums[0][1]},
                            {adds ? chain[1][0] : sums[1][0], adds ? chain[1][1] : sums[1][1]}};
  _tile_stored(0, out[0][0], 64);
  _tile_stored(2, out[1][0], 64);
  if constexpr (kColumns == 2) _tile_stored(1, out[0][1], 64);
  if constexpr (kColumns == 2) _tile_stored(3, out[1][1], 64);
  asm volatile("" ::: "memory");
  if (!adds) return;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 16
      for (int64_t at = 0; at < 256; at += kFloatLanes) {
        store(sums[i][j] + at, load(sums[i][j] + at) + load(chain[i][j] + at));
      }
    }
  }
}

template <int kParts, int kColumns>
static void multiply_tiles(const LeftTiles& left, const char* const (&right)[2],
                           float* const (&sums)[2][2], int64_t steps, bool accumulate) {
  NothingAhead nothing;
  multiply_tiles<kParts, kColumns>(left, right, sums, steps, accumulate, nothing);
}

#undef FLEXVAR_LOAD_LEFT
#undef FLEXVAR_LOAD_RIGHT
#undef FLEXVAR_MULTIPLY

}  // namespace flexvar::FLEXVAR_ISA
