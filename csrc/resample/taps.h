// What the CPU kernels of resampling take: tabulated windows and weights (built by table.h from
// weights.h).
#pragma once

#include <stdint.h>

namespace flexvar {

// Output i of an axis is the sum over k < count[i] of weights[i * stride + k] * in[start[i] + k].
// A count may be 0 (the adjoint of a nearest downsampling): that output is zero.
template <typename Real>
struct ResampleTaps {
  const int64_t* start;
  const int64_t* count;
  const Real* weights;
  int64_t stride;
  int64_t in_size;
  int64_t out_size;
};

}  // namespace flexvar
