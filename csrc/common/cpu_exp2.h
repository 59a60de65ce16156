// 2^x on vectors, the exponential of the CPU kernels.
#pragma once

#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

// 2^x to 2 ulp for -126 <= x <= 126; exactly 0 at -127; NaN stays NaN.
static inline __attribute__((always_inline)) Vector<float> exp2_within_range(Vector<float> x) {
  const Vector<float> shifted =
      x + 0x1.8p23f;  // rounds to an integer, which the low bits then hold
  const Vector<float> fraction = x - (shifted - 0x1.8p23f);
  // Minimax polynomial of 2^f on [-0.5, 0.5], relative error 2e-9 before rounding.
  Vector<float> y = fraction * 0.00015345774590969086f + 0.0013399930903688073f;
  y = y * fraction + 0.009618489071726799f;
  y = y * fraction + 0.05550328642129898f;
  y = y * fraction + 0.24022646248340607f;
  y = y * fraction + 0.6931471824645996f;
  y = y * fraction + 1.0f;
  return y * (Vector<float>)(((Bits32)shifted + 127) << 23);  // casts keep the bits
}

#if FLEXVAR_VECTOR_BYTES == 64
// The fraction of x above its floor.
static inline __attribute__((always_inline)) Vector<float> above_floor(Vector<float> x) {
  constexpr int to_floor = 1;
  return (Vector<float>)_mm512_maskz_reduce_ps(0xffff, (__m512)x, to_floor);
}
// y * 2^floor(x)
static inline __attribute__((always_inline)) Vector<float> scaled(Vector<float> y,
                                                                  Vector<float> x) {
  return (Vector<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)x);
}

// 2^x to 2 ulp, infinite and zero where that is beyond a float's range; NaN stays NaN.
static inline __attribute__((always_inline)) Vector<float> exp2_of_any(Vector<float> x) {
  const Vector<float> fraction = above_floor(x);
  // Minimax polynomial of 2^f on [0, 1], relative error 2e-9 before rounding.
  Vector<float> y = fraction * 0.0002170225489f + 0.001243968727f;
  y = y * fraction + 0.009678840637f;
  y = y * fraction + 0.05548334122f;
  y = y * fraction + 0.2402298301f;
  y = y * fraction + 0.6931470037f;
  y = y * fraction + 1.0f;
  return scaled(y, x);
}
#endif

#ifdef __AVX512BF16__
// 2^x with a relative error of 7.5e-5, a twenty-sixth of what rounding to bfloat16 makes; infinite
// and zero where that is beyond a float's range; NaN stays NaN.
static inline __attribute__((always_inline)) Vector<float> exp2_for_bfloat16(Vector<float> x) {
  const Vector<float> fraction = above_floor(x);
  Vector<float> y = fraction * 0.07802452147f + 0.2260671556f;
  y = y * fraction + 0.6958335638f;
  y = y * fraction + 0.9999251962f;
  return scaled(y, x);
}
#endif

}  // namespace flexvar::FLEXVAR_ISA
