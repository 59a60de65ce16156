#include "vq_lookup/cpu_integers.h"

#include "common/cpu_lines_ahead.h"
#include "vq_lookup/cpu_candidates.h"
#include "vq_lookup/cpu_codes.h"
#include "vq_lookup/cpu_units.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

constexpr int64_t kRows = VqTiles::kTileQueries;
constexpr int64_t kLanes = VqTiles::kTileCodes;
constexpr int64_t kBlockCodes = VqTiles::kBlockCodes;
// Tiles of codes at a time: kRows x 2 sums, two vectors of codes and one of a query; with AVX-512
// kRows maxima, too.
constexpr int kVectors = 2;
// Pairs of components at a time: with AVX2 a register is short else.
constexpr int64_t kUnroll = kLanes == 16 ? 4 : 1;
using Range = ScoreRange<int32_t>;
static_assert(kLanes == kFloatLanes);

IntLanes load_integers(const void* p) {
  IntLanes v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
void store_integers(void* p, IntLanes v) { __builtin_memcpy(p, &v, sizeof(v)); }

#if FLEXVAR_VECTOR_BYTES == 64
IntLanes to_integers(Vector<float> v) {
  return (IntLanes)_mm512_maskz_cvtps_epi32(0xffff, (__m512)(v * static_cast<float>(kVqUnit)));
}
void store_integers(int32_t* p, Vector<double> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtpd_epi32(0xff, (__m512d)v));
}
IntLanes maximum(IntLanes a, IntLanes b) {
  return (IntLanes)_mm512_maskz_max_epi32(0xffff, (__m512i)a, (__m512i)b);
}
// sum + the products of the pair x with each pair of e.
IntLanes add_products(IntLanes sum, int32_t x, IntLanes e) {
  return (IntLanes)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)e);
}
#else
IntLanes to_integers(Vector<float> v) {
  return (IntLanes)_mm256_cvtps_epi32((__m256)(v * static_cast<float>(kVqUnit)));
}
void store_integers(int32_t* p, Vector<double> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtpd_epi32((__m256d)v));
}
IntLanes maximum(IntLanes a, IntLanes b) {
  return (IntLanes)_mm256_max_epi32((__m256i)a, (__m256i)b);
}
IntLanes add_products(IntLanes sum, int32_t x, IntLanes e) {
  sum += (IntLanes)_mm256_madd_epi16(_mm256_set1_epi32(x), (__m256i)e);
  asm("" : "+x"(sum));  // or GCC adds up products first, for which there are no registers
  return sum;
}
#endif

// |score - kVqUnit² (x·e - |e|²/2)| of a query with this norm and codes that are no longer than
// rounding left the unit vectors. A component errs by half and by what float leaves of kVqUnit x
// (2^-9 and less), a code by what cpu_units.h adds, so by Cauchy and Schwarz a product by the error
// of each factor times the other's length and by the product of both errors. -|e|²/2 is taken as
// that of a unit vector, or rounded, and pass 2 rounds in double.
double score_error(int64_t dim, double norm) {
  constexpr double per_component = 0.502, most = 1 + 1e-6;
  const double length = per_component * __builtin_sqrt(dim);
  const double code_length = length + kVqUnit * most * unit_error(dim);
  return length * kVqUnit * most + code_length * (kVqUnit * norm + length) +
         kVqUnit * kVqUnit * kFloatError + 1;
}

// The maxima over each group of a block for a tile of queries. kPairs = 0: any number.
template <int kPairs>
__attribute__((always_inline)) inline void score_block(const char* codes,
                                                       const int32_t* negative_half,
                                                       const char* queries, int64_t any_pairs,
                                                       IntLanes (&best)[kRows]) {
  const int64_t pairs = kPairs ? kPairs : any_pairs;
#pragma GCC unroll 8
  for (int64_t m = 0; m < kRows; ++m) best[m] = IntLanes{} + Range::of_no_code;
  for (int64_t first = 0; first < VqTiles::kBlockTiles; first += kVectors) {
    IntLanes sum[kRows][kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      const IntLanes start = load_integers(negative_half + (first + n) * kLanes);
#pragma GCC unroll 8
      for (int64_t m = 0; m < kRows; ++m) sum[m][n] = start;
    }
    // Not to be read before the loop, for which there are no registers.
    asm("" : "+r"(queries));
    for (int64_t some = 0; some < pairs; some += kUnroll) {
#pragma GCC unroll 4
      for (int64_t pair = some; pair < some + kUnroll; ++pair) {
        IntLanes e[kVectors];
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) {
          e[n] = load_integers(codes + ((first + n) * pairs + pair) * sizeof(IntLanes));
        }
#pragma GCC unroll 8
        for (int64_t m = 0; m < kRows; ++m) {
          int32_t x;
          __builtin_memcpy(&x, queries + (pair * kRows + m) * 4, sizeof(x));
#pragma GCC unroll 2
          for (int n = 0; n < kVectors; ++n) sum[m][n] = add_products(sum[m][n], x, e[n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) best[m] = maximum(best[m], sum[m][n]);
    }
  }
}

// A block of codes as integers: [tile][pair of components][code].
void make_block(const VqTiles& tiles, int64_t block, char* codes, int32_t* negative_half) {
  const int64_t dim = tiles.base.dim, pairs = tiles.pairs();
  alignas(64) float columns[kVqMostDimOfIntegers * kLanes];
  for (int64_t c = dim; c < 2 * pairs; ++c) store(columns + c * kLanes, Vector<float>{});
  for (int64_t tile = 0; tile < VqTiles::kBlockTiles; ++tile) {
    int32_t* const halves = negative_half + tile * kLanes;
    const int64_t first = block * kBlockCodes + tile;
    if (make_units(tiles.base, first, VqTiles::kBlockTiles, columns)) {
      store_integers(halves, IntLanes{} - static_cast<int32_t>(kVqUnit * kVqUnit / 2));
    } else {
      double squares[kLanes];
      make_codes(tiles.base, first, VqTiles::kBlockTiles, columns, squares);
      for (int64_t i = 0; i < kLanes; i += kLanes / 2) {  // NaN converts to what is no code
        store_integers(halves + i, load(squares + i) * (-0.5 * kVqUnit * kVqUnit));
      }
    }
    for (int64_t pair = 0; pair < pairs; ++pair, codes += sizeof(IntLanes)) {
      const IntLanes even = to_integers(load(columns + 2 * pair * kLanes));
      const IntLanes odd = to_integers(load(columns + (2 * pair + 1) * kLanes));
      store_integers(codes, (even & 0xffff) | odd << 16);
    }
  }
}

template <int kPairs>
void score_tiles(const VqTiles& tiles, const VqQueries& of, int64_t block, bool is_last,
                 const char* codes, const int32_t* negative_half) {
  int32_t* const thresholds = tiles.thresholds + of.share * tiles.queries_of_tiles();
  auto* const candidates = tiles.candidates + of.share * tiles.queries_of_tiles();
  const int64_t block_bytes = kBlockCodes * tiles.base.dim * sizeof(float);
  LinesAhead ahead(reinterpret_cast<const char*>(tiles.base.codebook) + (block + 1) * block_bytes,
                   is_last ? 0 : 1, block_bytes, block_bytes, of.end - of.begin);
  for (int64_t tile = of.begin; tile < of.end; ++tile) {
    const int64_t first = tile * kRows;
    ahead.step();
    IntLanes best[kRows];
    const char* const queries = tiles.queries + tile * tiles.query_tile_bytes();
    // All queries do not fit into the L1 cache beside the codes: the next ones are asked for.
    for (int64_t byte = 0; byte < tiles.query_tile_bytes(); byte += 64) {
      __builtin_prefetch(queries + tiles.query_tile_bytes() + byte);
    }
    score_block<kPairs>(codes, negative_half, queries, tiles.pairs(), best);
    unsigned reached = 0;
#pragma GCC unroll 8
    for (int64_t m = 0; m < kRows; ++m) reached |= reaching(best[m], thresholds[first + m]);
    if (__builtin_expect(reached == 0, 1)) continue;
#pragma GCC unroll 8
    for (int64_t m = 0; m < kRows; ++m) {
      if (reaching(best[m], thresholds[first + m]) == 0) continue;
      add_candidates(tiles, first + m, block, best[m], thresholds[first + m],
                     candidates[first + m]);
    }
  }
}

}  // namespace

void vq_tiles_prepare_queries(const VqTiles& tiles, int64_t tile_begin, int64_t tile_end) {
  const VqLookupParams& params = tiles.base;
  const int64_t padded = params.padded_dim();
  int16_t components[kVqMostDimOfIntegers];
  for (int64_t n = tile_begin * kRows; n < tile_end * kRows; ++n) {
    prepare_latent(params, n);
    const float* const row = params.queries + n * padded;
    for (int64_t c = 0; c < padded; c += 8) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(row + c), _mm256_set1_ps(kVqUnit));
      const __m256i x = _mm256_cvtps_epi32(scaled);
      _mm_storeu_si128((__m128i*)(components + c),
                       _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
    }
    char* const out = tiles.queries + n / kRows * tiles.query_tile_bytes() + n % kRows * 4;
    for (int64_t pair = 0; pair < tiles.pairs(); ++pair) {
      __builtin_memcpy(out + pair * kRows * 4, components + 2 * pair, 4);
    }
  }
}

void vq_tiles_start(const VqTiles& tiles, const VqQueries& queries) {
  start_candidates(tiles, queries, [&](double norm) { return score_error(tiles.base.dim, norm); });
}

void vq_tiles_score(const VqTiles& tiles, const VqQueries& queries, int64_t block_begin,
                    int64_t block_end) {
  const int64_t dim = tiles.base.dim;
  const auto score = dim == 32 ? score_tiles<16> : dim == 8 ? score_tiles<4> : score_tiles<0>;
  char* const codes = tiles.code_blocks_of_workers + queries.worker * tiles.code_block_bytes();
  alignas(64) int32_t negative_half[kBlockCodes];
  for (int64_t block = block_begin; block < block_end; ++block) {
    make_block(tiles, block, codes, negative_half);
    if (queries.begin == queries.end) continue;
    score(tiles, queries, block, block + 1 == block_end, codes, negative_half);
  }
}

void vq_tiles_resolve(const VqTiles& tiles, int64_t shares, int64_t query_begin,
                      int64_t query_end) {
  resolve(tiles, shares, query_begin, query_end);
}

}  // namespace flexvar::FLEXVAR_ISA
