// 2^x, the exponential of the softmax.
#pragma once

#include "common/cpu_exp2.h"
#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

// 2^x for x <= 0 (also -inf) to 2 ulp; exactly 0 below 2^-126.5; NaN stays NaN.
static inline __attribute__((always_inline)) Vector<float> exp2_nonpositive(Vector<float> x) {
  return exp2_within_range(larger(Vector<float>{} - 127.0f, x));
}
static inline Vector<double> exp2_nonpositive(Vector<double> x) {
  for (int i = 0; i < VectorOf<double>::lanes; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

}  // namespace flexvar::FLEXVAR_ISA
