// 2^x, the exponential of the softmax.
#pragma once

#include "common/cpu_exp2.h"
#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

// 2^x for x <= 0 (also -inf) to 2 ulp; exactly 0 below 2^-126.5; NaN stays NaN.
static inline __attribute__((always_inline)) Vector<float> exp2_nonpositive(Vector<float> x) {
  x = x < -127.0f ? Vector<float>{} - 127.0f : x;
  return exp2_within_range(x);
}
static inline Vector<double> exp2_nonpositive(Vector<double> x) {
  for (int i = 0; i < VectorOf<double>::lanes; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

#ifdef FLEXVAR_ISA_avx512bf16
// 2^x for x <= 0 (also -inf) with a relative error of 7.5e-5, a twenty-sixth of what rounding to
// bfloat16 makes; NaN stays NaN.
static inline __attribute__((always_inline)) Vector<float> exp2_for_bfloat16(Vector<float> x) {
  constexpr int to_floor = 1;
  const Vector<float> fraction = (Vector<float>)_mm512_maskz_reduce_ps(0xffff, (__m512)x, to_floor);
  Vector<float> y = fraction * 0.07802452147f + 0.2260671556f;
  y = y * fraction + 0.6958335638f;
  y = y * fraction + 0.9999251962f;
  return (Vector<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)x);  // y * 2^floor(x)
}
#endif

}  // namespace flexvar::FLEXVAR_ISA
