// resample2d and its backward on planes [H, W]. A block makes a tile of pixels of several planes:
// sums down the columns first, into shared memory, and from these sums along the rows, as on the
// CPU. Mode nearest copies.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/divide_up.h"
#include "common/fast_divisor.h"
#include "common/ptx.cuh"
#include "resample/taps.cuh"

namespace flexvar {

constexpr int kResampleThreads = 256;
constexpr int kResampleTile = 32;     // longest side of a block's tile; a thread has one pixel
constexpr int kResampleTaps = 32;     // of a row or column, whose weights are there at a time
constexpr int kResampleChain = 8;     // longer chains of sums lose what is small beside them
constexpr int kResampleAhead = 4;     // taps whose pixels are under way at once
constexpr int kResampleLanes = 4;     // that make the weights of a row or column
constexpr int kResamplePatch = 1024;  // sums down columns that a block holds, of each plane

// A thread's pixel is that of so many planes: they share its windows and weights.
template <class Real>
constexpr int kResamplePlanes = sizeof(Real) == sizeof(double) ? 2 : 4;

template <class T, class Real>
struct Resample2dCudaParams {
  const T* in;  // [planes, in_height, in_width]
  T* out;       // [planes, out_height, out_width]
  int64_t planes;
  int in_height, in_width, out_height, out_width;
  bool adjoint;                  // from the resampling's outputs to its inputs
  ResampleAxis<Real> axes[2];    // y, x, of the resampling
  FastDivisor rows, columns;     // of a tile; fewer at the image's end
  FastDivisor patch;             // columns of the input whose sums are there at once
  FastDivisor tiles_x, tiles_y;  // of a block's number, in this order; then the planes
  int slots;                     // groups of kResamplePlanes planes that a block has at once
  int rounds;                    // and how many times it does so
};

template <class Real>
struct ResampleTileAxis {
  int start[kResampleTile], count[kResampleTile];
  Real weight[kResampleTaps][kResampleTile];
};

template <class Real>
struct ResampleStorage {
  ResampleTileAxis<Real> axes[2];
  Real sums[kResamplePlanes<Real>][kResamplePatch];  // of each slot's rows
};

template <class Index, class Real>
__device__ __forceinline__ ResampleAxis<Real, Index> with_index(const ResampleAxis<Real>& axis) {
  return {axis.mode, static_cast<Index>(axis.in_size), static_cast<Index>(axis.out_size),
          axis.scale};
}

// By four threads for every row and column: the taps of output `output`, number n of the tile, and
// the weights of those from tap `chunk` and input `begin` on, as many as there is room for. Returns
// how many taps there are.
template <class Real, class Index>
__device__ __forceinline__ int fill_taps(ResampleTileAxis<Real>& tile,
                                         const TapAxis<Real, Index>& taps, int output, int n,
                                         int chunk, int begin) {
  ResampleWindow<Real, Index> window{};
  TapRange<Index> range{};
  if (taps.transposed) {
    range = tap_range(taps, output);
  } else {
    window = resample_window(taps.axis, output);
    range = {window.start, window.count};
  }
  const auto start = static_cast<int>(range.start), count = static_cast<int>(range.count);
  const auto lane = static_cast<int>(threadIdx.x) % kResampleLanes;
  if (lane == 0) {
    tile.start[n] = start;
    tile.count[n] = count;
  }
  const int first = max(chunk, begin - start);
#pragma unroll 1
  for (int k = lane; k < min(count - first, kResampleTaps); k += kResampleLanes) {
    tile.weight[k][n] = taps.transposed ? tap_weight(taps, output, start + first + k)
                                        : resample_weight(taps.axis, window, first + k);
  }
  return count;
}

// Adds to the sum of each plane p that of weight(k) * pixel(k, p) over k < count.
template <class Real, class Weight, class Pixel>
__device__ __forceinline__ void add_taps(Real (&sum)[kResamplePlanes<Real>], int count, Real none,
                                         const Weight& weight, const Pixel& pixel) {
  constexpr int planes = kResamplePlanes<Real>;
  Real part[planes];
#pragma unroll
  for (int p = 0; p < planes; ++p) part[p] = none;
#pragma unroll 1
  for (int first = 0; first < count; first += kResampleAhead) {
    Real weights[kResampleAhead];
    decltype(pixel(0, 0)) pixels[kResampleAhead][planes];
#pragma unroll
    for (int k = 0; k < kResampleAhead; ++k) {
      if (first + k < count) {
        weights[k] = weight(first + k);
#pragma unroll
        for (int p = 0; p < planes; ++p) pixels[k][p] = pixel(first + k, p);
      }
    }
#pragma unroll
    for (int k = 0; k < kResampleAhead; ++k) {
      if (first + k < count) {
#pragma unroll
        for (int p = 0; p < planes; ++p) part[p] += weights[k] * load_real<Real>(&pixels[k][p]);
      }
    }
    if (first % kResampleChain == kResampleChain - kResampleAhead) {
#pragma unroll
      for (int p = 0; p < planes; ++p) {
        sum[p] += part[p];
        part[p] = none;
      }
    }
  }
#pragma unroll
  for (int p = 0; p < planes; ++p) sum[p] += part[p];
}

// The sums down columns [x0, x1) of the input for `rows` rows of `planes` planes, which begin at
// `in`: of the taps from `chunk` on whose weights are there.
template <class T, class Real>
__device__ __forceinline__ void sum_down(const Resample2dCudaParams<T, Real>& params,
                                         ResampleStorage<Real>& shared, const T* in, int planes,
                                         int rows, int chunk, int x0, int x1) {
  constexpr int planes_of_slot = kResamplePlanes<Real>;
  const Real none = no_taps<Real>(params.adjoint);
  const unsigned slot_rows = params.rows.divisor, row_columns = params.patch.divisor;
  const int64_t in_plane = int64_t{params.in_height} * params.in_width;
#pragma unroll 1
  for (unsigned item = threadIdx.x; item < params.slots * slot_rows * row_columns;
       item += kResampleThreads) {
    const unsigned row = params.patch.quotient(item), slot = params.rows.quotient(row);
    const auto column = static_cast<int>(item - row * row_columns);
    const auto i = static_cast<int>(row - slot * slot_rows);
    const int first_plane = static_cast<int>(slot) * planes_of_slot;
    if (column >= x1 - x0 || i >= rows || first_plane >= planes) continue;
    const T* source[planes_of_slot];  // what is not there is another plane's, and not stored
    source[0] = in + first_plane * in_plane +
                int64_t{shared.axes[0].start[i] + chunk} * params.in_width + x0 + column;
    Real sum[planes_of_slot];
#pragma unroll
    for (int p = 0; p < planes_of_slot; ++p) {
      if (p > 0) source[p] = source[p - 1] + (first_plane + p < planes ? in_plane : 0);
      sum[p] = none;
    }
    add_taps(
        sum, min(shared.axes[0].count[i] - chunk, kResampleTaps), none,
        [&](int k) { return shared.axes[0].weight[k][i]; },
        [&](int, int p) {
          const T pixel = *source[p];
          source[p] += params.in_width;
          return pixel;
        });
#pragma unroll
    for (int p = 0; p < planes_of_slot; ++p) shared.sums[p][item] = sum[p];
  }
}

// Adds to the sums of a pixel of several planes, column j of the tile, what the sums down columns
// [x0, x1) contribute, of which the pixel's row begins at `place`.
template <class Real>
__device__ __forceinline__ void sum_along(Real (&sum)[kResamplePlanes<Real>],
                                          const ResampleStorage<Real>& shared, int place, Real none,
                                          int j, int x0, int x1) {
  const int start = shared.axes[1].start[j], first = max(x0 - start, 0);
  place += start + first - x0;
  add_taps(
      sum, min(shared.axes[1].count[j], x1 - start) - first, none,
      [&](int k) { return shared.axes[1].weight[k][j]; },
      [&](int k, int p) { return shared.sums[p][place + k]; });
}

// kLong: an axis may be too long for 32 bits, a window may have more taps than there is room for, a
// tile more columns of the input.
template <class T, class Real, bool kLong>
__global__ void __launch_bounds__(kResampleThreads,
                                  (sizeof(Real) == sizeof(double) ? 1 : 2) + (kLong ? 0 : 1))
    resample2d_kernel(Resample2dCudaParams<T, Real> params) {
  using Index = std::conditional_t<kLong, int64_t, int>;
  constexpr int planes_of_slot = kResamplePlanes<Real>;
  auto& shared = shared_storage<ResampleStorage<Real>>();
  ptx::griddepcontrol_launch_dependents();
  const unsigned row_of_tiles = params.tiles_x.quotient(blockIdx.x);
  const auto left = static_cast<int>(params.tiles_x.remainder(blockIdx.x) * params.columns.divisor);
  const auto top = static_cast<int>(params.tiles_y.remainder(row_of_tiles) * params.rows.divisor);
  const int rows = min(params.out_height - top, static_cast<int>(params.rows.divisor));
  const int columns = min(params.out_width - left, static_cast<int>(params.columns.divisor));

  // The weights of the rows' taps from chunk_y on, and of the columns' taps of the input from x0
  // on. Returns the most taps of a row or column that is this thread's.
  const auto fill = [&](int chunk_y, int x0) {
    int longest = 0;
#pragma unroll 1
    for (int n = static_cast<int>(threadIdx.x) / kResampleLanes; n < rows + columns;
         n += kResampleThreads / kResampleLanes) {
      const bool of_x = n >= rows;
      const int number = of_x ? n - rows : n;
      const TapAxis<Real, Index> taps{with_index<Index>(params.axes[of_x]), params.adjoint};
      longest = max(longest, fill_taps(shared.axes[of_x], taps, (of_x ? left : top) + number,
                                       number, of_x ? 0 : chunk_y, of_x ? x0 : 0));
    }
    return longest;
  };
  const bool has_more_taps = __syncthreads_or(fill(0, 0) > kResampleTaps) != 0;
  const int first_x = shared.axes[1].start[0];
  const int last_x = shared.axes[1].start[columns - 1] + shared.axes[1].count[columns - 1];
  ptx::griddepcontrol_wait();

  // The thread's pixel.
  const unsigned row = params.columns.quotient(threadIdx.x), slot = params.rows.quotient(row);
  const auto j = static_cast<int>(threadIdx.x - row * params.columns.divisor);
  const auto i = static_cast<int>(row - slot * params.rows.divisor);
  const int place = static_cast<int>(row * params.patch.divisor);
  const int plane_of_pixel = static_cast<int>(slot) * planes_of_slot;
  const bool in_tile = i < rows && j < columns;
  const Real none = no_taps<Real>(params.adjoint);
  const int64_t in_plane = int64_t{params.in_height} * params.in_width;
  const int64_t out_plane = int64_t{params.out_height} * params.out_width;
  const int step = params.slots * planes_of_slot;
  int64_t first_plane = int64_t{params.tiles_y.quotient(row_of_tiles)} * params.rounds * step;
#pragma unroll 1
  for (int round = 0; round < params.rounds && first_plane < params.planes; ++round) {
    const auto planes = static_cast<int>(resample_min(params.planes - first_plane, int64_t{step}));
    const bool active = in_tile && plane_of_pixel < planes;
    const T* const in = params.in + first_plane * in_plane;
    Real sum[planes_of_slot];
#pragma unroll
    for (int p = 0; p < planes_of_slot; ++p) sum[p] = none;
    if constexpr (kLong) {
      // All weights are there, and the patch holds all columns; or they are made for every part.
      int longest_y = kResampleTaps, patch = last_x - first_x;
      const bool refill = has_more_taps || patch > static_cast<int>(params.patch.divisor);
      if (refill) {
        for (int n = 0; n < rows; ++n) longest_y = max(longest_y, shared.axes[0].count[n]);
        patch = min(static_cast<int>(params.patch.divisor), kResampleTaps);
      }
#pragma unroll 1
      for (int chunk = 0; chunk < longest_y; chunk += kResampleTaps) {
#pragma unroll 1
        for (int x0 = first_x, x1; x0 < last_x; x0 = x1) {
          x1 = x0 + min(last_x - x0, patch);
          if (refill) {
            __syncthreads();
            fill(chunk, x0);
          }
          __syncthreads();
          sum_down(params, shared, in, planes, rows, chunk, x0, x1);
          __syncthreads();
          if (active) sum_along(sum, shared, place, none, j, x0, x1);
        }
      }
    } else {
      if (round > 0) __syncthreads();
      sum_down(params, shared, in, planes, rows, 0, first_x, last_x);
      __syncthreads();
      if (active) sum_along(sum, shared, place, none, j, first_x, last_x);
    }
    const int stored = active ? planes - plane_of_pixel : 0;
    T* target = params.out + (first_plane + plane_of_pixel) * out_plane +
                int64_t{top + i} * params.out_width + left + j;
#pragma unroll
    for (int p = 0; p < planes_of_slot; ++p) {
      if (p < stored) store_real(target, sum[p]);
      target += out_plane;
    }
    first_plane += step;
  }
}

// Mode nearest without arithmetic, so T is any type of the elements' size. A thread copies kVector
// pixels side by side of each of a slot's planes, which are consecutive.
template <class T, class Real, int kVector>
__global__ void __launch_bounds__(kResampleThreads, 3)
    resample2d_nearest_kernel(Resample2dCudaParams<T, Real> params) {
  constexpr int planes_at_once = kVector == 8 ? 2 : kResamplePlanes<Real>;
  struct alignas(kVector * sizeof(T)) Pixels {
    T x[kVector];
  };
  ptx::griddepcontrol_launch_dependents();
  const unsigned row_of_tiles = params.tiles_x.quotient(blockIdx.x);
  const unsigned row = params.columns.quotient(threadIdx.x), slot = params.rows.quotient(row);
  const unsigned i =
      params.tiles_y.remainder(row_of_tiles) * params.rows.divisor + params.rows.remainder(row);
  const unsigned j = (params.tiles_x.remainder(blockIdx.x) * params.columns.divisor +
                      params.columns.remainder(threadIdx.x)) *
                     kVector;
  const int64_t planes_of_slot = int64_t{params.rounds} * kResamplePlanes<Real>;
  const int64_t plane =
      (int64_t{params.tiles_y.quotient(row_of_tiles)} * params.slots + slot) * planes_of_slot;
  const auto height = static_cast<unsigned>(params.out_height);
  const auto width = static_cast<unsigned>(params.out_width);
  if (slot >= static_cast<unsigned>(params.slots) || i >= height || j >= width) return;
  const auto nearest = [](ResampleAxis<Real> axis, unsigned output) {
    axis.mode = ResampleMode::nearest;  // known to the compiler, too
    return resample_window(with_index<unsigned>(axis), output).start;
  };
  unsigned column[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) column[k] = nearest(params.axes[1], j + k);
  const int64_t in_plane = int64_t{params.in_height} * params.in_width;
  const int64_t out_plane = int64_t{params.out_height} * params.out_width;
  const T* source =
      params.in + plane * in_plane + int64_t{nearest(params.axes[0], i)} * params.in_width;
  T* target = params.out + plane * out_plane + int64_t{i} * width + j;
  ptx::griddepcontrol_wait();
#pragma unroll 1
  for (auto left = static_cast<int>(resample_min(params.planes - plane, planes_of_slot)); left > 0;
       left -= planes_at_once) {
    Pixels pixels[planes_at_once];
#pragma unroll
    for (int p = 0; p < planes_at_once; ++p) {
      if (p < left) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) pixels[p].x[k] = source[column[k]];
      }
      source += in_plane;
    }
#pragma unroll
    for (int p = 0; p < planes_at_once; ++p) {
      if (p < left) *reinterpret_cast<Pixels*>(target) = pixels[p];
      target += out_plane;
    }
  }
}

// Input pixels that a window has at most; the adjoint's is of outputs.
template <class Real>
double resample_window_size(const TapAxis<Real>& taps) {
  const double scale = taps.axis.scale;
  switch (taps.axis.mode) {
    case ResampleMode::nearest:
      return 1;
    case ResampleMode::bilinear:
      return 2;
    case ResampleMode::bicubic:
      return 4;
    case ResampleMode::area:
      return scale + 1;
    default:
      return scale > 1 ? 2 * scale : 2;  // bilinear_antialias
  }
}

// How many inputs `outputs` outputs side by side have for taps, at most: coordinates are rounded,
// each of both ends less than eight times.
template <class Real>
int64_t resample_span(const TapAxis<Real>& taps, int64_t outputs) {
  const double scale = taps.axis.scale;
  const double rounding =
      static_cast<double>(taps.axis.in_size) * (sizeof(Real) == sizeof(double) ? 0x1p-49 : 0x1p-20);
  const double window = resample_window_size(taps) + rounding;
  const auto steps = static_cast<double>(outputs - 1);
  const double length = taps.transposed ? (steps + window) / scale : steps * scale + window;
  return resample_min(static_cast<int64_t>(length) + 2, taps.in_size());
}

constexpr int kResampleBlocks = 8;  // a multiprocessor that has so many has enough to do

// Chooses the tile, of columns of `vector` pixels, and what a block does one after the other.
// No result depends on what is chosen.
struct Resample2dPlan {
  int64_t blocks;
  bool is_long;
};
template <class T, class Real>
Resample2dPlan plan_resample2d(Resample2dCudaParams<T, Real>& params, int vector,
                               int multiprocessors) {
  const TapAxis<Real> taps_y{params.axes[0], params.adjoint};
  const TapAxis<Real> taps_x{params.axes[1], params.adjoint};
  params.in_height = static_cast<int>(taps_y.in_size());
  params.in_width = static_cast<int>(taps_x.in_size());
  params.out_height = static_cast<int>(taps_y.out_size());
  params.out_width = static_cast<int>(taps_x.out_size());
  const int64_t height = params.out_height, width = divide_up(params.out_width, vector);
  int64_t columns = divide_up(width, divide_up(width, kResampleTile));
  int64_t patch = 1, items = columns;  // of a row
  if (vector == 1) {
    while (columns > 1 && resample_span(taps_x, columns) > kResamplePatch) columns /= 2;
    patch = resample_min(resample_span(taps_x, columns), kResamplePatch);
    items = resample_max(columns, patch);
  }
  int64_t rows = resample_min(resample_min(height, kResampleTile),
                              resample_min(kResampleThreads / columns, kResamplePatch / patch));
  rows = divide_up(height, divide_up(height, rows));
  const int64_t slots = resample_max(resample_min(kResampleThreads / (rows * items),
                                                  divide_up(params.planes, kResamplePlanes<Real>)),
                                     1);
  const int64_t tiles_x = divide_up(width, columns), tiles_y = divide_up(height, rows);
  const int64_t groups = divide_up(params.planes, slots * kResamplePlanes<Real>);
  const int64_t rounds = resample_max(
      resample_min(tiles_x * tiles_y * groups / (kResampleBlocks * multiprocessors), groups), 1);
  params.rows = rows;
  params.columns = columns;
  params.patch = patch;
  params.tiles_x = tiles_x;
  params.tiles_y = tiles_y;
  params.slots = static_cast<int>(slots);
  params.rounds = static_cast<int>(divide_up(groups, divide_up(groups, rounds)));
  const auto fits = [](const ResampleAxis<Real>& axis) {
    return (axis.in_size + 1) * (axis.out_size + 1) < int64_t{1} << 31;
  };
  const bool is_long =
      !fits(params.axes[0]) || !fits(params.axes[1]) || resample_span(taps_y, 1) > kResampleTaps ||
      resample_span(taps_x, 1) > kResampleTaps || resample_span(taps_x, columns) > patch;
  return {tiles_x * tiles_y * divide_up(groups, params.rounds), is_long};
}

}  // namespace flexvar
