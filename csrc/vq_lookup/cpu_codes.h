// Codes from the rows of the codebook, a vector of them at a time, with the arithmetic of
// cpu_exact.h: to the bit what that makes of each.
#pragma once

#include "vq_lookup/cpu_exact.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

// As doubles, the lower half of the lanes first.
struct DoubleLanes {
  Vector<double> half[2];
};

inline DoubleLanes to_doubles(Vector<float> v) {
#if FLEXVAR_VECTOR_BYTES == 64  // what GCC makes of the shuffles below goes through memory
  const __m256 low = _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0);
  const __m256 high = _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1);
  return {{widen(low), widen(high)}};
#elif FLEXVAR_VECTOR_BYTES == 32
  return {{widen(_mm256_castps256_ps128((__m256)v)), widen(_mm256_extractf128_ps((__m256)v, 1))}};
#else
  Floats halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return {{widen(halves[0]), widen(halves[1])}};
#endif
}

inline Vector<float> to_floats(const DoubleLanes& lanes) {
#if FLEXVAR_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_mask_broadcast_f32x8(_mm512_castps256_ps512(narrow(lanes.half[0])),
                                                    0xff00, narrow(lanes.half[1]));
#elif FLEXVAR_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_set_m128(narrow(lanes.half[1]), narrow(lanes.half[0]));
#else
  const Floats halves[2] = {narrow(lanes.half[0]), narrow(lanes.half[1])};
  Vector<float> v;
  __builtin_memcpy(&v, halves, sizeof(v));
  return v;
#endif
}

inline bool all_positive(Vector<double> v) {
#if FLEXVAR_VECTOR_BYTES == 64
  return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_GT_OQ) == 0xff;
#elif FLEXVAR_VECTOR_BYTES == 32
  return _mm256_movemask_pd((__m256d)(v > 0.0)) == 0xf;
#else
  bool all = true;
  for (int i = 0; i < VectorOf<double>::lanes; ++i) all = all && v[i] > 0.0;
  return all;
#endif
}

// The first `count` numbers, the rest zero.
inline Vector<float> load_some(const float* p, int64_t count) {
#if FLEXVAR_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_maskz_loadu_ps(count >= 16 ? 0xffff : (1u << count) - 1, p);
#else
  return load_first(p, count);
#endif
}

// The sum over the columns of their squares, in the order of cpu_exact.h.
inline DoubleLanes sum_squares(const float* columns, int64_t dim) {
  DoubleLanes sums[8] = {};
  for (int64_t first = 0; first < dim; first += 8) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < 8; ++c) {
      if (first + c >= dim) break;
      const DoubleLanes x = to_doubles(load(columns + (first + c) * kFloatLanes));
      for (int half = 0; half < 2; ++half) sums[c].half[half] += x.half[half] * x.half[half];
    }
  }
  DoubleLanes total;
  for (int half = 0; half < 2; ++half) {
    const auto pair = [&](int c) { return sums[c].half[half] + sums[c + 4].half[half]; };
    total.half[half] = (pair(0) + pair(2)) + (pair(1) + pair(3));
  }
  return total;
}

// Calls visit(c, component c of a row to a lane) for row `first` of the codebook and every
// `step`-th from there: `count` of them, no more than a vector has lanes; zeros stand behind.
template <typename Visit>
inline __attribute__((always_inline)) void for_each_component(const VqLookupParams& params,
                                                              int64_t first, int64_t step,
                                                              int64_t count, const Visit& visit) {
  constexpr int64_t lanes = kFloatLanes;
  const int64_t dim = params.dim;
  const float* const rows = params.codebook + first * dim;
  for (int64_t c = 0; c < dim; c += lanes) {
    Vector<float> square[lanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) {
      square[i] = i < count ? load_some(rows + i * step * dim + c, dim - c) : Vector<float>{};
    }
    transpose<float>(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) {
      if (c + i >= dim) break;
      visit(c + i, square[i]);
    }
  }
}

// Code `first` and every `step`-th from there, as many as a vector has lanes: component c of each
// at columns + c * lanes. Also |e|², NaN where there is no finite row.
inline void make_codes(const VqLookupParams& params, int64_t first, int64_t step, float* columns,
                       double* squares) {
  constexpr int64_t lanes = kFloatLanes;
  const int64_t dim = params.dim, count = (params.num_codes - first + step - 1) / step;
  for_each_component(params, first, step, count,
                     [&](int64_t c, Vector<float> v) { store(columns + c * lanes, v); });
  DoubleLanes squared = sum_squares(columns, dim), scale;
  double scales[lanes];
  for (int half = 0; half < 2; ++half) {
    scale.half[half] = row_scales(squared.half[half], params.normalize);
    store(scales + half * lanes / 2, scale.half[half]);
  }
  const bool are_codes =
      count >= lanes && all_positive(scale.half[0]) && all_positive(scale.half[1]);
  if (!are_codes) {
    for (int64_t i = 0; i < lanes; ++i) {
      if (i >= count) scales[i] = 0.0;
      for (int64_t c = 0; c < dim && scales[i] == 0.0; ++c) columns[c * lanes + i] = 0;  // not NaN
    }
  }
  for (int64_t c = 0; c < dim; ++c) {
    DoubleLanes x = to_doubles(load(columns + c * lanes));
    for (int half = 0; half < 2; ++half) x.half[half] *= scale.half[half];
    store(columns + c * lanes, to_floats(x));
  }
  squared = sum_squares(columns, dim);
  for (int half = 0; half < 2; ++half) store(squares + half * lanes / 2, squared.half[half]);
  for (int64_t i = 0; i < lanes && params.scales != nullptr; ++i) {
    params.scales[first + i * step] = scales[i];
  }
  for (int64_t i = 0; i < lanes && !are_codes; ++i) {
    if (scales[i] != 0.0) continue;
    squares[i] = __builtin_nan("");
    if (i < count) __atomic_store_n(params.codebook_is_finite, false, __ATOMIC_RELAXED);
  }
}

}  // namespace
}  // namespace flexvar::FLEXVAR_ISA
