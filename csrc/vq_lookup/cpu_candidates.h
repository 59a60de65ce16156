// The candidates of cpu_tiles.h, from AVX2 on: what keeps them in pass 1 and decides among them in
// pass 2. Scores are float or int32.
#pragma once

#include "vq_lookup/cpu_exact.h"
#include "vq_lookup/cpu_tiles.h"
#include "vq_lookup/cpu_units.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

typedef int32_t IntLanes __attribute__((vector_size(FLEXVAR_VECTOR_BYTES)));

template <typename Score>
struct ScoreRange;
template <>
struct ScoreRange<float> {
  static constexpr float least = -kInfinity, most = kInfinity, of_no_code = -kInfinity;
};
template <>
struct ScoreRange<int32_t> {
  static constexpr int32_t of_no_code = INT32_MIN, least = INT32_MIN + 1, most = INT32_MAX;
};

template <typename Lanes>
auto largest_lane(Lanes v) {
  const auto max = [](auto a, auto b) { return a > b ? a : b; };
  if constexpr (sizeof(v) == 64) {
    return largest_lane(max(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)));
  } else {
    const auto four =
        max(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7));
    return max(max(four[0], four[1]), max(four[2], four[3]));
  }
}

// The lanes that reach the threshold; NaN, on either side, does.
#if FLEXVAR_VECTOR_BYTES == 64
inline unsigned reaching(Vector<float> v, float threshold) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
}
inline unsigned reaching(IntLanes v, int32_t threshold) {
  return _mm512_cmpge_epi32_mask((__m512i)v, _mm512_set1_epi32(threshold));
}
#else
inline unsigned reaching(Vector<float> v, float threshold) {
  return _mm256_movemask_ps((__m256)(v < threshold)) ^ 0xff;
}
inline unsigned reaching(IntLanes v, int32_t threshold) {
  return _mm256_movemask_ps((__m256)(v >= threshold));
}
#endif

inline float lowered(float score, double slack) { return static_cast<float>(score - slack); }
// Rounded down, and still more than the score of no code.
inline int32_t lowered(int32_t score, double slack) {
  constexpr int32_t least = ScoreRange<int32_t>::least;
  const double exact = __builtin_floor(score - slack);
  return exact > least ? static_cast<int32_t>(exact) : least;
}

// Empty lists for tiles of queries, given the error bound of a query by its norm.
template <typename Tiles, typename Bound>
void start_candidates(const Tiles& tiles, const VqQueries& queries, const Bound& bound) {
  using Range = ScoreRange<typename Tiles::Score>;
  constexpr int64_t kTile = Tiles::kTileQueries;
  auto* const thresholds = tiles.thresholds + queries.share * tiles.queries_of_tiles();
  auto* const candidates = tiles.candidates + queries.share * tiles.queries_of_tiles();
  for (int64_t n = queries.begin * kTile; n < queries.end * kTile; ++n) {
    const double norm = n < tiles.base.num_latents ? tiles.base.query_norms[n] : __builtin_nan("");
    thresholds[n] = norm == norm ? Range::least : Range::most;
    const Best none;
    candidates[n].slack = 2 * bound(norm);
    candidates[n].best_score = none.score;
    candidates[n].best_code = none.code;
    candidates[n].count = 0;
  }
}

// The candidates that are still some to the best of them all.
template <typename Tiles, typename Score>
void settle(const Tiles& tiles, int64_t n, Score threshold, VqCandidates<Score>& of) {
  const VqLookupParams& params = tiles.base;
  Best best{of.best_score, of.best_code};
  for (int64_t i = 0; i < of.count; ++i) {
    if (of.groups[i].score < threshold) continue;
    find_best(params, params.queries + n * params.padded_dim(),
              of.groups[i].group * int64_t{Tiles::kBlockTiles}, Tiles::kBlockTiles, best);
  }
  of.best_score = best.score;
  of.best_code = best.code;
  of.count = 0;
}

// Makes room: leaves out what a better group has ruled out since.
template <typename Tiles, typename Score>
void drop_candidates(const Tiles& tiles, int64_t n, Score threshold, VqCandidates<Score>& of) {
  int32_t count = 0;
  for (int32_t i = 0; i < of.count; ++i) {
    if (!(of.groups[i].score < threshold)) of.groups[count++] = of.groups[i];
  }
  of.count = count;
  if (count == VqCandidates<Score>::kMost) settle(tiles, n, threshold, of);
}

// Adds those of a block's groups, with these scores, that reach the threshold, which rises to the
// best of them less the slack. What is NaN is a candidate, and a NaN the threshold of all.
template <typename Tiles, typename Lanes, typename Score>
__attribute__((noinline)) void add_candidates(const Tiles& tiles, int64_t n, int64_t block,
                                              Lanes scores, Score& threshold,
                                              VqCandidates<Score>& of) {
  const Score rises = lowered(largest_lane(scores), of.slack);
  if (!(rises <= threshold)) threshold = rises;
  Score lanes[Tiles::kTileCodes];
  __builtin_memcpy(lanes, &scores, sizeof(lanes));
  for (unsigned mask = reaching(scores, threshold); mask != 0; mask &= mask - 1) {
    const int64_t lane = __builtin_ctz(mask);
    if (of.count == VqCandidates<Score>::kMost) drop_candidates(tiles, n, threshold, of);
    of.groups[of.count++] = {lanes[lane], static_cast<int32_t>(block * Tiles::kTileCodes + lane)};
  }
}

// The one of kCodes codes from `first` on that is the nearest to the unit vector x by more than
// float errs, or -1.
template <int64_t kCodes>
inline int64_t only_nearest(const VqLookupParams& params, const float* x, int64_t first) {
  constexpr int64_t lanes = kFloatLanes, parts = kCodes / lanes;
  static_assert(kCodes % lanes == 0);
  if (!params.normalize || first + kCodes > params.num_codes) return -1;
  // Twice a score's error: that of its dot product, of the code, and of |e|²/2 beside 1/2.
  const double error = unit_error(params.dim) + params.dim * (kFloatError / 2) + kFloatError;
  const float slack = static_cast<float>(2 * error);
  Vector<float> scores[parts];
  float best = -kInfinity;
  for (int64_t part = 0; part < parts; ++part) {
    Vector<float> dots[4] = {}, squares[4] = {};
    for_each_component(params, first + part * lanes, 1, lanes, [&](int64_t c, Vector<float> v) {
      dots[c % 4] += x[c] * v;
      squares[c % 4] += v * v;
    });
    const Vector<float> squared = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    if (!are_usual(squared)) return -1;
    scores[part] = ((dots[0] + dots[1]) + (dots[2] + dots[3])) * reciprocal_root(squared);
    const float largest = largest_lane(scores[part]);
    best = largest > best ? largest : best;
  }
  int64_t found = 0, code = -1;
  for (int64_t part = 0; part < parts; ++part) {
    const unsigned near = reaching(scores[part], best - slack);
    if (near == 0) continue;
    found += __builtin_popcount(near);
    code = first + part * lanes + __builtin_ctz(near);
  }
  return found == 1 ? code : -1;
}

// The first code of the one group that may hold the nearest, or -1 where there are more.
template <typename Tiles, typename Score>
int64_t only_group(const Tiles& tiles, int64_t n, int64_t shares, Score threshold) {
  int64_t found = 0, group = 0;
  for (int64_t share = 0; share < shares; ++share) {
    const auto& of = tiles.candidates[share * tiles.queries_of_tiles() + n];
    if (of.best_score != Best().score) return -1;  // the list was full
    for (int64_t i = 0; i < of.count; ++i) {
      if (of.groups[i].score < threshold) continue;
      ++found;
      group = of.groups[i].group;
    }
  }
  return found == 1 ? group * int64_t{Tiles::kBlockTiles} : -1;
}

// By exact scores of all candidates.
template <typename Tiles, typename Score>
int64_t settle_all(const Tiles& tiles, int64_t n, int64_t shares, Score threshold) {
  Best best;
  for (int64_t share = 0; share < shares; ++share) {
    auto& of = tiles.candidates[share * tiles.queries_of_tiles() + n];
    settle(tiles, n, threshold, of);
    if (of.best_score > best.score || (of.best_score == best.score && of.best_code < best.code)) {
      best = {of.best_score, of.best_code};
    }
  }
  return best.code;
}

template <typename Tiles>
void resolve(const Tiles& tiles, int64_t shares, int64_t query_begin, int64_t query_end) {
  constexpr int64_t kTile = Tiles::kTileQueries;
  const VqLookupParams& params = tiles.base;
  const int64_t group_bytes = Tiles::kBlockTiles * params.dim * int64_t{sizeof(float)};
  typename Tiles::Score thresholds[kTile];
  int64_t first_codes[kTile];
  for (int64_t first = query_begin * kTile; first < query_end * kTile; first += kTile) {
    const int64_t left = params.num_latents - first, count = left < kTile ? left : kTile;
    // All groups of a tile are asked for before the first is read: most come from the other cores.
    for (int64_t i = 0; i < count; ++i) {
      thresholds[i] = tiles.thresholds[first + i];
      for (int64_t share = 1; share < shares; ++share) {
        const auto other = tiles.thresholds[share * tiles.queries_of_tiles() + first + i];
        if (!(other <= thresholds[i])) thresholds[i] = other;
      }
      first_codes[i] = only_group(tiles, first + i, shares, thresholds[i]);
      if (first_codes[i] < 0) continue;
      const float* const codes = params.codebook + first_codes[i] * params.dim;
      for (int64_t byte = 0; byte < group_bytes; byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(codes) + byte);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = first + i;
      int64_t code = -1;
      if constexpr (Tiles::kBlockTiles % kFloatLanes == 0) {  // not the tile unit's
        const float* const x = params.queries + n * params.padded_dim();
        if (first_codes[i] >= 0) code = only_nearest<Tiles::kBlockTiles>(params, x, first_codes[i]);
      }
      params.indices[n] = code >= 0 ? code : settle_all(tiles, n, shares, thresholds[i]);
    }
  }
}

}  // namespace
}  // namespace flexvar::FLEXVAR_ISA
