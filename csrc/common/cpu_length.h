// Lengths of the rows that are normalised; a row's result depends on nothing but itself.
#pragma once

#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

template <typename Real>
static inline Real square_root(Real x) {
  if constexpr (sizeof(Real) == 8) {
    return __builtin_sqrt(x);
  } else {
    return __builtin_sqrtf(x);
  }
}

// Squares are summed in 16 parts, by index modulo 16, whatever the vectors' width.
template <typename Real, typename From>
static inline Real sum_of_squares(const From* row, int64_t dim) {
  constexpr int64_t lanes = VectorOf<Real>::lanes, vectors = 16 / lanes;
  Vector<Real> sums[vectors] = {};
  for (int64_t d = 0; d < dim; d += 16) {
    for (int64_t i = 0; i < vectors; ++i) {
      const Vector<Real> x = load(row + d + i * lanes);
      sums[i] += x * x;
    }
  }
  Real parts[16];
  for (int64_t i = 0; i < vectors; ++i) store(parts + i * lanes, sums[i]);
  for (int64_t half = 8; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

}  // namespace flexvar::FLEXVAR_ISA
