#include "vq_lookup/cpu_amx.h"

#include "common/cpu_amx.h"
#include "vq_lookup/cpu_candidates.h"
#include "vq_lookup/cpu_codes.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

constexpr int64_t kVqTile = 16;  // of codes, and of queries
constexpr int64_t kVqBlockTiles = VqTiles::kBlockTiles;
static_assert(VqTiles::kTileCodes == kVqTile && VqTiles::kTileQueries == kVqTile);
constexpr int64_t kMostSteps = 16;
constexpr int64_t kMostDepth = kMostSteps * kTileDepth;

typedef uint16_t BfloatLanes __attribute__((vector_size(32)));

BfloatLanes to_bfloat(Vector<float> v) {
  return (BfloatLanes)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)v);
}
Vector<float> to_float(BfloatLanes v) {
  return (Vector<float>)((Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v) << 16);
}

// (xh, xm, xh) of a query: [3 * dim] of the depth.
void split_query(const float* row, int64_t dim, Bfloat16* parts) {
  for (int64_t c = 0; c < dim; c += kFloatLanes) {
    const int64_t count = dim - c;
    const __mmask16 mask = count >= kFloatLanes ? 0xffff : (1u << count) - 1;
    const Vector<float> x = (Vector<float>)_mm512_maskz_loadu_ps(mask, row + c);
    const BfloatLanes high = to_bfloat(x);
    _mm256_mask_storeu_epi16(parts + c, mask, (__m256i)high);
    _mm256_mask_storeu_epi16(parts + dim + c, mask, (__m256i)to_bfloat(x - to_float(high)));
    _mm256_mask_storeu_epi16(parts + 2 * dim + c, mask, (__m256i)high);
  }
}

// Scores of two tiles of queries with a block of codes: [query tile][code tile][query, code].
using BlockSums = float[2][kVqBlockTiles][256];

void multiply_block(const VqTiles& tiles, const char* const (&queries)[2], const char* codes,
                    BlockSums& sums) {
  const int64_t steps = tiles.steps(), panel_bytes = steps * kTileBytes;
  if (steps > 1) {
    const LeftTiles left{{queries[0], queries[1]}, kPanelSteps<1>};
    for (int64_t t = 0; t < kVqBlockTiles; t += 2) {
      const char* const right[2] = {codes + t * panel_bytes, codes + (t + 1) * panel_bytes};
      float* const out[2][2] = {{sums[0][t], sums[0][t + 1]}, {sums[1][t], sums[1][t + 1]}};
      multiply_tiles<1, 2>(left, right, out, steps, false);
    }
    return;
  }
  asm volatile("" ::: "memory");  // the tile instructions do not tell the compiler what they read
  _tile_loadd(4, queries[0], 64);
  _tile_loadd(5, queries[1], 64);
  // Sums are stored only when their tile is needed anew: the unit takes some 50 cycles to make
  // them.
  const auto multiply = [&](int64_t t, bool stores) __attribute__((always_inline)) {
    _tile_loadd(6, codes + t * kTileBytes, 64);
    _tile_loadd(7, codes + (t + 1) * kTileBytes, 64);
    if (stores) _tile_stored(0, sums[0][t - 2], 64);
    _tile_zero(0);
    _tile_dpbf16ps(0, 4, 6);
    if (stores) _tile_stored(1, sums[1][t - 2], 64);
    _tile_zero(1);
    _tile_dpbf16ps(1, 5, 6);
    if (stores) _tile_stored(2, sums[0][t - 1], 64);
    _tile_zero(2);
    _tile_dpbf16ps(2, 4, 7);
    if (stores) _tile_stored(3, sums[1][t - 1], 64);
    _tile_zero(3);
    _tile_dpbf16ps(3, 5, 7);
  };
  multiply(0, false);
  for (int64_t t = 2; t < kVqBlockTiles; t += 2) multiply(t, true);
  _tile_stored(0, sums[0][kVqBlockTiles - 2], 64);
  _tile_stored(1, sums[1][kVqBlockTiles - 2], 64);
  _tile_stored(2, sums[0][kVqBlockTiles - 1], 64);
  _tile_stored(3, sums[1][kVqBlockTiles - 1], 64);
  asm volatile("" ::: "memory");
}

// The error of pass 1.
class ScoreError {
 public:
  // |score - exact score| <= what the parts leave out: 2^-18 |x||e| for xm em, as much for each
  // rest, and less than a hundredth of that for products of those; n u / (1 - n u) of n roundings
  // on the way of a term, u = 2^-24 (its products, the sum |e|²/2 and its parts, the threshold);
  // and what is flushed to zero, factors included.
  ScoreError(int64_t dim, double most)
      : most_(most), roundings_((3 * dim + 28) * 0x1p-24), flushed_((4 * dim + 16) * 0x1p-126) {
    roundings_ /= 1 - roundings_;
  }
  double bound(double norm) const {
    // Beyond these an infinite bound makes every group a candidate, whatever overflowed.
    const bool is_bounded = magnitude(norm) < 1e37 && norm < 1e37 && most_ < 1e37;
    return is_bounded ? roundings_ * magnitude(norm) + left_out(norm)
                      : static_cast<double>(kInfinity);
  }

 private:
  double magnitude(double norm) const { return 1.02 * most_ * (norm + 0.5 * most_); }
  double left_out(double norm) const {
    return 3.1 * 0x1p-18 * norm * most_ + flushed_ * (norm + most_ + 1);
  }
  double most_, roundings_, flushed_;
};

// The maxima over each group of a block for a tile of queries, and what they are candidates for.
template <bool kAddsHalf>
void reduce_tile(const VqTiles& tiles, const float (&sums)[kVqBlockTiles][256], int64_t block,
                 int64_t tile, float* thresholds, VqCandidates<float>* candidates) {
  Vector<float> half[kVqBlockTiles];
  if (kAddsHalf) {
    const float* const place = tiles.negative_half + block * kVqBlockTiles * kVqTile;
#pragma GCC unroll 8
    for (int64_t t = 0; t < kVqBlockTiles; ++t) half[t] = load(place + t * kVqTile);
  }
  constexpr int64_t kRows = 4;  // with one branch, which is hardly ever taken
  for (int64_t first = 0; first < kVqTile; first += kRows) {
    Vector<float> best[kRows];
    unsigned reached = 0;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kRows; ++i) {
      Vector<float> score[kVqBlockTiles];
#pragma GCC unroll 8
      for (int64_t t = 0; t < kVqBlockTiles; ++t) {
        score[t] = load(sums[t] + (first + i) * kVqTile);
        if (kAddsHalf) score[t] += half[t];
      }
#pragma GCC unroll 4
      for (int64_t some = kVqBlockTiles / 2; some > 0; some /= 2) {
#pragma GCC unroll 8
        for (int64_t t = 0; t < some; ++t) {
          score[t] = score[t] > score[t + some] ? score[t] : score[t + some];
        }
      }
      best[i] = score[0];
      reached |= reaching(best[i], thresholds[first + i]);
    }
    if (__builtin_expect(reached == 0, 1)) continue;
    for (int64_t i = first; i < first + kRows; ++i) {
      if (reaching(best[i - first], thresholds[i]) == 0) continue;
      add_candidates(tiles, tile * kVqTile + i, block, best[i - first], thresholds[i],
                     candidates[i]);
    }
  }
}

}  // namespace

void vq_tiles_prepare_codes(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end) {
  const VqLookupParams& params = tiles.base;
  const int64_t dim = params.dim, steps = tiles.steps();
  alignas(64) float columns[VqTiles::kMaxDim * kVqTile];
  BfloatLanes parts[kMostDepth] = {};  // (eh, eh, em), the parts of -|e|²/2, zeros
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t first_of_block = tile / kVqBlockTiles * kVqBlockTiles * kVqTile;
    double squares[kVqTile], largest = 0;
    make_codes(params, first_of_block + tile % kVqBlockTiles, kVqBlockTiles, columns, squares);
    for (int64_t c = 0; c < dim; ++c) {
      const Vector<float> e = load(columns + c * kVqTile);
      const BfloatLanes high = to_bfloat(e);
      parts[c] = parts[dim + c] = high;
      parts[2 * dim + c] = to_bfloat(e - to_float(high));
    }
    float* const negative_half = tiles.negative_half + tile * kVqTile;
    for (int64_t i = 0; i < kVqTile; ++i) {
      negative_half[i] =
          squares[i] == squares[i] ? static_cast<float>(-0.5 * squares[i]) : -kInfinity;
      largest = squares[i] > largest ? squares[i] : largest;
    }
    tiles.tile_norms[tile] = __builtin_sqrt(largest);
    Vector<float> half = load(negative_half);
    for (int part = 0; part < 3 && tiles.multiplies_half(); ++part) {
      const BfloatLanes rounded = to_bfloat(half);
      parts[3 * dim + part] = rounded;
      half = half > -kInfinity ? half - to_float(rounded) : 0.0f;
    }
    char* panel = tiles.codes + tile * steps * kTileBytes;
    for (int64_t k = 0; k < steps * kTileDepth; k += 2, panel += 64) {
      const __m512i even = _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)parts[k]);
      const __m512i odd = _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)parts[k + 1]);
      _mm512_store_si512(panel, (__m512i)((Bits32)even | (Bits32)odd << 16));
    }
  }
}

void vq_tiles_prepare_queries(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end) {
  const VqLookupParams& params = tiles.base;
  alignas(64) Bfloat16 rows[kVqTile][kMostDepth] = {};
  if (tiles.multiplies_half()) {
    for (auto& row : rows) {
      for (int64_t part = 0; part < 3; ++part)
        row[3 * params.dim + part] = from_float<Bfloat16>(1.0f);
    }
  }
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t i = 0; i < kVqTile; ++i) {
      prepare_latent(params, tile * kVqTile + i);
      split_query(params.queries + (tile * kVqTile + i) * params.padded_dim(), params.dim, rows[i]);
    }
    pack_left_panel<1>(tiles.queries + tile * tiles.steps() * kTileBytes, rows[0], kMostDepth,
                       kVqTile, tiles.steps() * kTileDepth);
  }
}

void vq_tiles_start(const VqTiles& tiles, const VqQueries& queries) {
  const ScoreError error(tiles.base.dim, tiles.max_code_norm);
  start_candidates(tiles, queries, [&](double norm) { return error.bound(norm); });
}

void vq_tiles_score(const VqTiles& tiles, const VqQueries& queries, int64_t block_begin,
                    int64_t block_end) {
  constexpr int64_t kQueryTiles = 16;  // that stay in the L1 cache
  float* const thresholds = tiles.thresholds + queries.share * tiles.queries_of_tiles();
  auto* const candidates = tiles.candidates + queries.share * tiles.queries_of_tiles();
  const TileScope scope;
  const int64_t panel_bytes = tiles.steps() * kTileBytes;
  const auto reduce = tiles.multiplies_half() ? reduce_tile<false> : reduce_tile<true>;
  alignas(64) BlockSums sums;
  for (int64_t first = queries.begin; first < queries.end; first += kQueryTiles) {
    const int64_t end = first + kQueryTiles < queries.end ? first + kQueryTiles : queries.end;
    for (int64_t block = block_begin; block < block_end; ++block) {
      const char* const codes = tiles.codes + block * kVqBlockTiles * panel_bytes;
      for (int64_t query = first; query < end; query += 2) {
        // Behind the last tile the last one again, for sums that nobody reads.
        const bool is_pair = query + 1 < end;
        const char* const panel = tiles.queries + query * panel_bytes;
        multiply_block(tiles, {panel, is_pair ? panel + panel_bytes : panel}, codes, sums);
        for (int64_t tile = query; tile < query + 1 + is_pair; ++tile) {
          reduce(tiles, sums[tile - query], block, tile, thresholds + tile * kVqTile,
                 candidates + tile * kVqTile);
        }
      }
    }
  }
}

void vq_tiles_resolve(const VqTiles& tiles, int64_t shares, int64_t query_begin,
                      int64_t query_end) {
  resolve(tiles, shares, query_begin, query_end);
}

}  // namespace flexvar::FLEXVAR_ISA
