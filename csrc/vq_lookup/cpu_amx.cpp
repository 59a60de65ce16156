#include "vq_lookup/cpu_amx.h"

#include "common/cpu_amx.h"
#include "vq_lookup/cpu_exact.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

constexpr int64_t kMostSteps = 16;
// Of each rounding of a float32 sum, relative; a sum of squares has fewer than its terms, and 16.
constexpr double kSumError = 0x1p-23;

// (xh, xm, xh) for queries, (eh, eh, em) for codes: [3 * dim] of the depth. Returns |row|², summed
// in float32.
float split_row(const float* row, int64_t dim, bool is_code, Bfloat16* parts) {
  Vector<float> squares{};
  for (int64_t c = 0; c < dim; c += kFloatLanes) {
    const int64_t count = dim - c;
    const Vector<float> x = load_first(row + c, count);
    squares += x * x;
    const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    const Vector<float> left =
        x - (Vector<float>)((Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, high) << 16);
    const __m256i middle = (__m256i)_mm512_cvtneps_pbh((__m512)left);
    const __mmask16 mask = count >= kFloatLanes ? 0xffff : (1u << count) - 1;
    _mm256_mask_storeu_epi16(parts + c, mask, high);
    _mm256_mask_storeu_epi16(parts + dim + c, mask, is_code ? high : middle);
    _mm256_mask_storeu_epi16(parts + 2 * dim + c, mask, is_code ? middle : high);
  }
  const auto eight = __builtin_shufflevector(squares, squares, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(squares, squares, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// The factors of 8 rows as row_scale gives them, a row to a lane.
Vector<double> row_scales(const float* rows, int64_t dim, bool normalize) {
  const __m256i index = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                           _mm256_set1_epi32(static_cast<int>(dim)));
  Vector<double> sums[8] = {};
  for (int64_t c = 0; c < dim; ++c) {
    const Vector<double> x = (Vector<double>)_mm512_maskz_cvtps_pd(
        0xff, _mm256_i32gather_ps(rows + c, index, sizeof(float)));
    sums[c % 8] += x * x;
  }
  const Vector<double> squared =
      ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  Vector<double> scale = Vector<double>{} + 1.0;
  if (normalize) {
    const Vector<double> norm = (Vector<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)squared);
    scale = 1.0 / (norm > 1e-12 ? norm : 1e-12);
  }
  return squared < static_cast<double>(__builtin_inf()) ? scale : 0.0;
}

// A tile of sums [code, query] to the maxima over the codes.
inline __attribute__((always_inline)) Vector<float> maximum_of(const float* sums,
                                                               const float* negative_half) {
  Vector<float> best[2] = {load(sums) + negative_half[0], load(sums + 16) + negative_half[1]};
#pragma GCC unroll 14
  for (int i = 2; i < 16; ++i) {
    const Vector<float> score = load(sums + 16 * i) + negative_half[i];
    best[i % 2] = score > best[i % 2] ? score : best[i % 2];
  }
  return best[0] > best[1] ? best[0] : best[1];
}

}  // namespace

void vq_tiles_prepare_codes(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end) {
  const VqLookupParams& params = tiles.base;
  const int64_t dim = params.dim, steps = tiles.steps();
  alignas(64) Bfloat16 rows[kVqTile][kMostSteps * kTileDepth] = {};
  float code[kMostSteps * kTileDepth];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    float largest = 0;
    double scales[kVqTile] = {};
    for (int64_t i = 0; i < kVqTile; i += 8) {
      const int64_t first = tile * kVqTile + i;
      if (first + 8 <= params.num_codes) {
        store(scales + i, row_scales(params.codebook + first * dim, dim, params.normalize));
      } else {
        for (int64_t v = first; v < params.num_codes; ++v) {
          scales[v - tile * kVqTile] = row_scale(params.codebook + v * dim, dim, params.normalize);
        }
      }
    }
    for (int64_t i = 0; i < kVqTile; ++i) {
      const int64_t v = tile * kVqTile + i;
      const double scale = scales[i];
      if (v < params.num_codes) params.inverse_norms[v] = scale;
      float squared = 0;
      if (scale == 0.0) {
        for (int64_t c = 0; c < 3 * dim; ++c) rows[i][c] = {};
      } else {
        for (int64_t c = 0; c < dim; c += 8) {
          typedef float Float8 __attribute__((vector_size(32)));
          const Float8 e = __builtin_convertvector(
              load_scaled(params.codebook + v * dim + c, dim - c, scale), Float8);
          __builtin_memcpy(code + c, &e, sizeof(e));
        }
        squared = split_row(code, dim, true, rows[i]);
      }
      tiles.negative_half[v] = scale == 0.0 ? -kInfinity : -0.5f * squared;
      largest = squared > largest ? squared : largest;
    }
    params.block_norms[tile] =
        __builtin_sqrt(static_cast<double>(largest)) * (1 + kSumError * (dim + 16));
    pack_left_panel<1>(tiles.codes + tile * steps * kTileBytes, rows[0], kMostSteps * kTileDepth,
                       kVqTile, steps * kTileDepth, 0);
  }
}

void vq_tiles_prepare_queries(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end) {
  const VqLookupParams& params = tiles.base;
  alignas(64) Bfloat16 rows[kVqTile][kMostSteps * kTileDepth] = {};
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    for (int64_t i = 0; i < kVqTile; ++i) {
      prepare_latent(params, tile * kVqTile + i);
      split_row(params.queries + (tile * kVqTile + i) * params.padded_dim(), params.dim, false,
                rows[i]);
    }
    pack_right_panel<1>(tiles.queries + tile * tiles.steps() * kTileBytes, rows[0],
                        kMostSteps * kTileDepth, kVqTile, tiles.steps() * kTileDepth);
  }
}

void vq_tiles_score(const VqTiles& tiles, int64_t query_begin, int64_t query_end,
                    int64_t code_begin, int64_t code_end) {
  const TileScope scope;
  const int64_t panel_bytes = tiles.steps() * kTileBytes;
  const int64_t stride = (query_end - query_begin) * kVqTile;
  alignas(64) float sums[2][2][2][256];  // two turns: one is read while the unit makes the other
  int64_t turn = 0, code_before = 0, query_before = 0;
  bool is_first = true;
  const auto reduce = [&](const float (&of)[2][2][256]) __attribute__((always_inline)) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2 && query_before + j < query_end; ++j) {
        store(tiles.group_max + (code_before + i) * stride +
                  (query_before + j - query_begin) * kVqTile,
              maximum_of(of[i][j], tiles.negative_half + (code_before + i) * kVqTile));
      }
    }
  };
  for (int64_t code = code_begin; code < code_end; code += 2) {
    const char* const tile = tiles.codes + code * panel_bytes;
    const LeftTiles left{{tile, tile + panel_bytes}, kPanelSteps<1>};
    for (int64_t query = query_begin; query < query_end; query += 2) {
      const char* const panel = tiles.queries + query * panel_bytes;
      const char* const right[2] = {panel, panel + panel_bytes};
      float* const out[2][2] = {{sums[turn][0][0], sums[turn][0][1]},
                                {sums[turn][1][0], sums[turn][1][1]}};
      if (query + 1 < query_end) {
        multiply_tiles<1, 2>(left, right, out, tiles.steps(), false);
      } else {
        multiply_tiles<1, 1>(left, right, out, tiles.steps(), false);
      }
      turn = 1 - turn;
      if (!is_first) reduce(sums[turn]);
      is_first = false;
      code_before = code;
      query_before = query;
    }
  }
  if (!is_first) reduce(sums[1 - turn]);
}

void vq_tiles_resolve(const VqTiles& tiles, int64_t query_begin, int64_t query_end) {
  const VqLookupParams& params = tiles.base;
  const int64_t stride = (query_end - query_begin) * kVqTile, codes = tiles.code_tiles();
  const double dim = static_cast<double>(params.dim), most = params.max_code_norm;
  // |score - exact score| <= what the parts leave out: 2^-18 |x||e| for xm em, as much for each
  // rest, and less than a hundredth of that for products of those; n u / (1 - n u) of n roundings
  // on the way of a term, u = 2^-24 (its products, the sum |e|²/2, the threshold below); and what
  // is flushed to zero, factors included.
  const double roundings = (3 * dim + 24) * 0x1p-24, left_out = 3.1 * 0x1p-18;
  for (int64_t tile = query_begin; tile < query_end; ++tile) {
    const float* const group_max = tiles.group_max + (tile - query_begin) * kVqTile;
    Vector<float> largest = load(group_max);
    for (int64_t g = 1; g < codes; ++g) {
      const Vector<float> other = load(group_max + g * stride);
      largest = other > largest ? other : largest;
    }
    Best best[kVqTile];
    unsigned known = 0;
    Vector<float> threshold{};
    for (int64_t i = 0; i < kVqTile && tile * kVqTile + i < params.num_latents; ++i) {
      const int64_t n = tile * kVqTile + i;
      params.indices[n] = 0;
      const double norm = params.query_norms[n];
      if (norm != norm) continue;
      known |= 1u << i;
      const double magnitude = 1.02 * most * (norm + 0.5 * most);
      const double bound = roundings / (1 - roundings) * magnitude + left_out * norm * most +
                           (4 * dim + 8) * 0x1p-126 * (norm + most + 1);
      // Beyond these an infinite bound makes every group a candidate, whatever overflowed.
      const bool is_bounded = magnitude < 1e37 && norm < 1e37 && most < 1e37;
      threshold[i] = is_bounded ? static_cast<float>(largest[i] - 2 * bound) : -kInfinity;
    }
    for (int64_t g = 0; g < codes; ++g) {
      // NaN counts as a candidate.
      unsigned candidates = known & _mm512_cmp_ps_mask((__m512)load(group_max + g * stride),
                                                       (__m512)threshold, _CMP_NLT_UQ);
      for (; candidates != 0; candidates &= candidates - 1) {
        const int64_t i = __builtin_ctz(candidates);
        find_best(params, params.queries + (tile * kVqTile + i) * params.padded_dim(), g * kVqTile,
                  (g + 1) * kVqTile, 1, best[i]);
      }
    }
    for (; known != 0; known &= known - 1) {
      const int64_t i = __builtin_ctz(known);
      params.indices[tile * kVqTile + i] = best[i].code;
    }
  }
}

}  // namespace flexvar::FLEXVAR_ISA
