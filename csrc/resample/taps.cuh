// Rows of a resampling matrix or of its transpose, for the CUDA kernels of resample2d and
// embed_resample.
#pragma once

#include "common/cuda.cuh"
#include "resample/weights.h"

namespace flexvar {

// Elements are stored as T and summed as Real: double for double, float for all others.
template <class Real, class T>
__device__ __forceinline__ Real load_real(const T* p) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return *p;
  } else {
    return to_float(*p);
  }
}
template <class T, class Real>
__device__ __forceinline__ void store_real(T* p, Real x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    *p = x;
  } else {
    *p = from_float<T>(x);
  }
}

// One axis of a kernel: its output i is a sum over inputs. The transposed one goes the way of a
// gradient, from the resampling's outputs to its inputs.
template <class Real, class Index = int64_t>
struct TapAxis {
  ResampleAxis<Real, Index> axis;
  bool transposed;

  __host__ __device__ Index in_size() const { return transposed ? axis.out_size : axis.in_size; }
  __host__ __device__ Index out_size() const { return transposed ? axis.in_size : axis.out_size; }
};

// The inputs that output i sums over: [start, start + count). A count may be 0.
template <class Index>
struct TapRange {
  Index start;
  Index count;
};

template <class Real, class Index>
__device__ __forceinline__ TapRange<Index> tap_range(const TapAxis<Real, Index>& taps,
                                                     typename ResampleAxis<Real, Index>::Number i) {
  if (taps.transposed) {
    const ResampleReaders<Index> readers = resample_readers(taps.axis, i);
    return {readers.start, readers.count};
  }
  const ResampleWindow<Real, Index> window = resample_window(taps.axis, i);
  return {window.start, window.count};
}

// What a sum of taps starts from. A copied -0 stays -0 behind -0, not behind 0; an input that
// nothing reads has the gradient 0.
template <class Real>
__device__ __forceinline__ Real no_taps(bool transposed) {
  return transposed ? Real(0) : Real(-0.0);
}
template <class Real, class Index>
__device__ __forceinline__ Real no_taps(const TapAxis<Real, Index>& taps) {
  return no_taps<Real>(taps.transposed);
}

// The weight of input p in output i; p must lie in the range of i.
template <class Real, class Index>
__device__ __forceinline__ Real tap_weight(const TapAxis<Real, Index>& taps,
                                           typename ResampleAxis<Real, Index>::Number i,
                                           typename ResampleAxis<Real, Index>::Number p) {
  const Index out = taps.transposed ? p : i, in = taps.transposed ? i : p;
  const ResampleWindow<Real, Index> window = resample_window(taps.axis, out);
  return resample_weight(taps.axis, window, in - window.start);
}

}  // namespace flexvar
