#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "common/float_element.h"
#include "resample/taps.h"

namespace flexvar {

template <typename Real>
struct Resample2dParams {
  const void* in;  // [planes, y.in_size, x.in_size], contiguous
  void* out;       // [planes, y.out_size, x.out_size], contiguous
  Element element;
  int64_t planes;
  ResampleTaps<Real> y, x;
};

// Rows of the output, counted through all planes, are computed in blocks of this many, so that a
// vector's lanes are rows.
constexpr int64_t kResampleMaxLanes = 16;

// Computes the output rows [begin, end). `scratch` holds (x.in_size + kResampleMaxLanes) *
// kResampleMaxLanes elements.
FLEXVAR_DECLARE_CPU_KERNEL(resample2d_rows, (const Resample2dParams<float>& params, float* scratch,
                                             int64_t begin, int64_t end));
FLEXVAR_DECLARE_CPU_KERNEL(resample2d_rows_double, (const Resample2dParams<double>& params,
                                                    double* scratch, int64_t begin, int64_t end));

}  // namespace flexvar
