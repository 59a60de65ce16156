// Unit vectors of codes in float, for scores whose error has a bound: a few times as quick as with
// the arithmetic of cpu_exact.h, which is left what these scores cannot tell apart.
#pragma once

#include "vq_lookup/cpu_codes.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

constexpr double kFloatError = 0x1p-23;  // twice what rounding to float changes at most

// |u - e| of a unit vector as made here and as cpu_exact.h makes it: half of what rounding makes of
// a sum of squares, the reciprocal root, a product, and the rounding of e.
inline double unit_error(int64_t dim) {
  return (0.5 * static_cast<double>(dim) + 8) * (kFloatError / 2);
}

// Lengths whose squares float holds, and which no row's factor is clamped for.
inline bool are_usual(Vector<float> squared) {
#if FLEXVAR_VECTOR_BYTES == 64
  const __m512 least = _mm512_set1_ps(0x1p-60f), most = _mm512_set1_ps(0x1p60f);
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)squared, least, _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(above, (__m512)squared, most, _CMP_LE_OQ) == 0xffff;
#else
  return _mm256_movemask_ps((__m256)((squared >= 0x1p-60f) & (squared <= 0x1p60f))) == 0xff;
#endif
}

// 1 / sqrt(v), within 4 roundings of it.
inline Vector<float> reciprocal_root(Vector<float> v) {
#if FLEXVAR_VECTOR_BYTES == 64
  const Vector<float> estimate = (Vector<float>)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)v);
  return estimate + estimate * (0.5f - 0.5f * v * estimate * estimate);
#else
  return 1.0f / square_roots(v);
#endif
}

// Code `first` and every `step`-th from there as in make_codes, each within unit_error of what that
// makes; false where a row is not there, not finite or of no usual length.
inline bool make_units(const VqLookupParams& params, int64_t first, int64_t step, float* columns) {
  constexpr int64_t lanes = kFloatLanes;
  if (first + (lanes - 1) * step >= params.num_codes) return false;
  Vector<float> squares[4] = {};
  for_each_component(params, first, step, lanes, [&](int64_t c, Vector<float> v) {
    store(columns + c * lanes, v);
    squares[c % 4] += v * v;
  });
  const Vector<float> squared = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  if (!are_usual(squared)) return false;
  const Vector<float> scale = reciprocal_root(squared);
  for (int64_t c = 0; c < params.dim; ++c) {
    store(columns + c * lanes, scale * load(columns + c * lanes));
  }
  return true;
}

}  // namespace
}  // namespace flexvar::FLEXVAR_ISA
