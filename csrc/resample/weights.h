// Coordinates and weights of resampling along one axis, as torch.nn.functional.interpolate with
// align_corners=False has them: one output coordinate is a weighted sum over a window of input
// coordinates.
//
//   const auto axis = make_resample_axis<float>(mode, in_size, out_size);
//   const auto window = resample_window(axis, i);  // out[i] = sum over k < window.count of
//   resample_weight(axis, window, k);              //   weight(k) * in[window.start + k]
//   resample_readers(axis, p);                     // the outputs whose windows hold input p
//
// An image is resampled along each axis independently. `Real` is double for float64 tensors, float
// otherwise. No headers of the standard library: this compiles for every instruction set and for
// CUDA.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace flexvar {

enum class ResampleMode : int { nearest, bilinear, bilinear_antialias, bicubic, area };

// Index is int for CUDA kernels of axes whose (in_size + 1) * (out_size + 1) fits.
template <typename Real, typename Index = int64_t>
struct ResampleAxis {
  using Number = Index;  // of a pixel or tap
  ResampleMode mode;
  Index in_size;
  Index out_size;
  Real scale;  // input pixels per output pixel
};

template <typename Real, typename Index = int64_t>
struct ResampleWindow {
  Index start;
  Index count;  // at least 1; start + count <= in_size
  // What `resample_weight` needs besides; by mode:
  //   bilinear            offset = fraction of the way from the first input to the second
  //   bicubic             offset = position of the output relative to input `start`
  //   bilinear_antialias  offset = position of input `start` relative to the output's centre
  Real offset;
  Real total;  // bilinear_antialias: the sum of the weights before they are normalised
};

// A run of output coordinates.
template <typename Index>
struct ResampleReaders {
  Index start;
  Index count;
};

template <typename Index, typename Real>
FLEXVAR_HOST_DEVICE Index resample_floor(Real x) {
  const Index truncated = static_cast<Index>(x);
  return truncated - (static_cast<Real>(truncated) > x ? 1 : 0);
}

FLEXVAR_HOST_DEVICE int64_t resample_min(int64_t a, int64_t b) { return a < b ? a : b; }
FLEXVAR_HOST_DEVICE int64_t resample_max(int64_t a, int64_t b) { return a > b ? a : b; }
template <typename Index>
FLEXVAR_HOST_DEVICE Index resample_min(Index a, Index b) {
  return a < b ? a : b;
}
template <typename Index>
FLEXVAR_HOST_DEVICE Index resample_max(Index a, Index b) {
  return a > b ? a : b;
}

template <typename Real>
FLEXVAR_HOST_DEVICE ResampleAxis<Real> make_resample_axis(ResampleMode mode, int64_t in_size,
                                                          int64_t out_size) {
  return {mode, in_size, out_size, static_cast<Real>(in_size) / static_cast<Real>(out_size)};
}

// Where output i lies among the inputs: scale * (i + 1/2), and that less 1/2. Windows and weights
// are computed from it at several places, which must round it alike, or a window would not be that
// of its weights: on CUDA the compiler is not to choose which products and sums it fuses.
template <typename Real, typename Index>
FLEXVAR_HOST_DEVICE Real resample_center(const ResampleAxis<Real, Index>& axis,
                                         typename ResampleAxis<Real, Index>::Number i) {
  const Real position = static_cast<Real>(i) + Real(0.5);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Real) == sizeof(double)) {
    return __dmul_rn(axis.scale, position);
  } else {
    return __fmul_rn(axis.scale, position);
  }
#else
  return axis.scale * position;
#endif
}
template <typename Real, typename Index>
FLEXVAR_HOST_DEVICE Real resample_source(const ResampleAxis<Real, Index>& axis,
                                         typename ResampleAxis<Real, Index>::Number i) {
  const Real position = static_cast<Real>(i) + Real(0.5);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Real) == sizeof(double)) {
    return __fma_rn(axis.scale, position, -0.5);
  } else {
    return __fmaf_rn(axis.scale, position, -0.5f);
  }
#else
  return axis.scale * position - Real(0.5);
#endif
}

// The triangle filter of bilinear_antialias is stretched when the image shrinks.
template <typename Real, typename Index>
FLEXVAR_HOST_DEVICE Real antialias_width(const ResampleAxis<Real, Index>& axis) {
  return axis.scale > Real(1) ? axis.scale : Real(1);
}

// The window of output i: PIL's rule, rounded outwards at the filter's support. The weights'
// total is the sum of an arithmetic series on each side of the centre, so that a single weight
// can be had without a loop.
template <typename Real, typename Index>
FLEXVAR_HOST_DEVICE ResampleWindow<Real, Index> antialias_window(
    const ResampleAxis<Real, Index>& axis, typename ResampleAxis<Real, Index>::Number i) {
  const Real width = antialias_width(axis);
  const Real center = resample_center(axis, i);
  const Index start = resample_max(static_cast<Index>(center - width + Real(0.5)), Index(0));
  const Index end = resample_min(static_cast<Index>(center + width + Real(0.5)), axis.in_size);
  const Index count = end - start;
  const Real offset = static_cast<Real>(start) - center + Real(0.5);
  const Index left = resample_min(resample_max(-resample_floor<Index>(offset), Index(0)),
                                  count);  // offset + k < 0
  const Real n = static_cast<Real>(count), l = static_cast<Real>(left);
  const Real left_distance = -(l * offset + l * (l - 1) / 2);
  const Real right_distance = (n - l) * offset + (n * (n - 1) - l * (l - 1)) / 2;
  return {start, count, offset, n - (left_distance + right_distance) / width};
}

template <typename Real, typename Index>
FLEXVAR_HOST_DEVICE ResampleWindow<Real, Index> resample_window(
    const ResampleAxis<Real, Index>& axis, typename ResampleAxis<Real, Index>::Number i) {
  const Index last = axis.in_size - 1;
  if (axis.mode == ResampleMode::area) {
    const Index start = i * axis.in_size / axis.out_size;
    const Index end = ((i + 1) * axis.in_size + axis.out_size - 1) / axis.out_size;
    return {start, end - start, Real(0), Real(0)};
  }
  if (axis.mode == ResampleMode::nearest) {
    const Index start = static_cast<Index>(static_cast<Real>(i) * axis.scale);
    return {resample_min(start, last), 1, Real(0), Real(0)};
  }
  if (axis.mode == ResampleMode::bilinear_antialias) return antialias_window(axis, i);

  Real source = resample_source(axis, i);
  if (axis.mode == ResampleMode::bilinear) {
    if (source < Real(0)) source = Real(0);
    const Index start = resample_min(static_cast<Index>(source), last);
    const Real fraction = source - static_cast<Real>(start);
    return {start, start < last ? Index(2) : Index(1), fraction < Real(1) ? fraction : Real(1),
            Real(0)};
  }
  // bicubic: four inputs around the source; those outside the image are the border's.
  const Index below = resample_min(resample_floor<Index>(source), last);
  const Index start = resample_max(below - 1, Index(0));
  const Index end = resample_min(below + 3, axis.in_size);
  return {start, end - start, source - static_cast<Real>(start), Real(0)};
}

// The cubic convolution kernel of Keys (1981) with A = -0.75, at a distance in [0, 2]. In factors
// of its roots, 1 and 2: as a sum of powers, terms up to 6 would cancel.
template <typename Real>
FLEXVAR_HOST_DEVICE Real cubic_kernel(Real distance) {
  const Real a = Real(-0.75), from_1 = distance - 1, from_2 = distance - 2;
  if (distance <= Real(1)) return from_1 * (((a + 2) * distance - 1) * distance - 1);
  return a * from_1 * (from_2 * from_2);
}

// Weight of input start + k, whose share includes the taps outside the image when it is a border.
template <typename Real, typename Index>
FLEXVAR_HOST_DEVICE Real bicubic_weight(const ResampleAxis<Real, Index>& axis,
                                        const ResampleWindow<Real, Index>& window,
                                        typename ResampleAxis<Real, Index>::Number k) {
  const Index below =
      resample_min(resample_floor<Index>(window.offset), axis.in_size - 1 - window.start);
  Real fraction = window.offset - static_cast<Real>(below);
  fraction = fraction < Real(1) ? fraction : Real(1);
  Real weight = 0;
  for (Index tap = -1; tap <= 2; ++tap) {
    const Index inside = resample_min(resample_max(below + tap, Index(0)), window.count - 1);
    const Real distance = fraction - static_cast<Real>(tap);
    if (inside == k) weight += cubic_kernel(distance < 0 ? -distance : distance);
  }
  return weight;
}

template <typename Real, typename Index>
FLEXVAR_HOST_DEVICE Real resample_weight(const ResampleAxis<Real, Index>& axis,
                                         const ResampleWindow<Real, Index>& window,
                                         typename ResampleAxis<Real, Index>::Number k) {
  switch (axis.mode) {
    case ResampleMode::area:
      return Real(1) / static_cast<Real>(window.count);
    case ResampleMode::bilinear:
      return k == 0 && window.count == 2 ? Real(1) - window.offset
             : window.count == 2         ? window.offset
                                         : Real(1);
    case ResampleMode::bicubic:
      return bicubic_weight(axis, window, k);
    case ResampleMode::bilinear_antialias: {
      const Real signed_distance = window.offset + static_cast<Real>(k);
      const Real distance = signed_distance < 0 ? -signed_distance : signed_distance;
      const Real weight = Real(1) - distance / antialias_width(axis);
      return weight > Real(0) ? weight / window.total : Real(0);
    }
    default:  // nearest
      return Real(1);
  }
}

// The outputs whose windows hold input p (none in a nearest downsampling, perhaps). Starts and
// ends of windows grow with the output coordinate, so these are consecutive: two binary searches.
template <typename Real, typename Index>
FLEXVAR_HOST_DEVICE ResampleReaders<Index> resample_readers(
    const ResampleAxis<Real, Index>& axis, typename ResampleAxis<Real, Index>::Number p) {
  if (axis.mode == ResampleMode::area) {  // i in / out < p + 1 and (i + 1) in / out > p
    const Index first = p * axis.out_size / axis.in_size;
    const Index end = ((p + 1) * axis.out_size + axis.in_size - 1) / axis.in_size;
    return {first, end - first};
  }
  Index first = 0, limit = axis.out_size;
  while (first < limit) {  // the first window that ends after p
    const Index middle = first + (limit - first) / 2;
    const ResampleWindow<Real, Index> window = resample_window(axis, middle);
    if (window.start + window.count > p) {
      limit = middle;
    } else {
      first = middle + 1;
    }
  }
  Index end = first;
  limit = axis.out_size;
  while (end < limit) {  // the first window that starts after p
    const Index middle = end + (limit - end) / 2;
    if (resample_window(axis, middle).start > p) {
      limit = middle;
    } else {
      end = middle + 1;
    }
  }
  return {first, end - first};
}

}  // namespace flexvar
