// resample2d and its backward on planes [H, W]. A thread computes one pixel of a few planes; the
// weights of its tile of pixels are tabulated in shared memory, a chunk of taps at a time.
#pragma once

#include "common/cuda.cuh"
#include "resample/taps.cuh"

namespace flexvar {

constexpr int kResampleThreads = 256;
constexpr int kResampleTile = 32;  // largest side of a block's tile
constexpr int kResampleTaps = 8;   // taps tabulated at a time

template <class T, class Real>
struct Resample2dCudaParams {
  const T* in;  // [planes, y.in_size(), x.in_size()]
  T* out;       // [planes, y.out_size(), x.out_size()]
  int64_t planes;
  TapAxis<Real> y, x;
  int tile_height, tile_width;  // of a block; at most kResampleThreads pixels
};

template <class Real>
struct ResampleTileAxis {
  int64_t start[kResampleTile];
  int64_t count[kResampleTile];
  Real weight[kResampleTile][kResampleTaps];
};

template <class Real>
struct ResampleStorage {
  ResampleTileAxis<Real> y, x;
};

// The block's threads fill in the tile's ranges and return the largest count. Ends with a barrier.
template <class Real>
__device__ int64_t fill_tile_ranges(ResampleTileAxis<Real>& tile, const TapAxis<Real>& taps,
                                    int64_t first, int size) {
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kResampleThreads) {
    const TapRange range = tap_range(taps, first + i);
    tile.start[i] = range.start;
    tile.count[i] = range.count;
  }
  __syncthreads();
  int64_t largest = 0;
  for (int i = 0; i < size; ++i) largest = resample_max(largest, tile.count[i]);
  return largest;
}

// The weights of taps [chunk, chunk + kResampleTaps) of every range.
template <class Real>
__device__ void fill_tile_weights(ResampleTileAxis<Real>& tile, const TapAxis<Real>& taps,
                                  int64_t first, int size, int64_t chunk) {
  for (int j = static_cast<int>(threadIdx.x); j < size * kResampleTaps; j += kResampleThreads) {
    const int i = j / kResampleTaps, k = j % kResampleTaps;
    if (chunk + k < tile.count[i]) {
      tile.weight[i][k] = tap_weight(taps, first + i, tile.start[i] + chunk + k);
    }
  }
}

template <class T, class Real, int kPlanes>
__global__ void __launch_bounds__(kResampleThreads, 2)
    resample2d_kernel(Resample2dCudaParams<T, Real> params) {
  auto& shared = shared_storage<ResampleStorage<Real>>();
  const int64_t height = params.y.out_size(), width = params.x.out_size();
  const int64_t tiles_x = (width + params.tile_width - 1) / params.tile_width;
  const int64_t tiles_y = (height + params.tile_height - 1) / params.tile_height;
  const int64_t tile = blockIdx.x % (tiles_x * tiles_y), group = blockIdx.x / (tiles_x * tiles_y);
  const int64_t top = tile / tiles_x * params.tile_height;
  const int64_t left = tile % tiles_x * params.tile_width;
  const int rows = static_cast<int>(resample_min(params.tile_height, height - top));
  const int columns = static_cast<int>(resample_min(params.tile_width, width - left));

  // Threads: pixels of the tile first, then planes.
  const int pixels = params.tile_height * params.tile_width;
  const int slots = kResampleThreads / pixels;
  const int slot = static_cast<int>(threadIdx.x) / pixels;
  const int pixel = static_cast<int>(threadIdx.x) % pixels;
  const int i = pixel / params.tile_width, j = pixel % params.tile_width;
  const int64_t first_plane = group * slots * kPlanes + slot;
  const bool active = slot < slots && i < rows && j < columns && first_plane < params.planes;
  const int64_t in_width = params.x.in_size(), in_plane = params.y.in_size() * in_width;

  const int64_t taps_y = fill_tile_ranges(shared.y, params.y, top, rows);
  const int64_t taps_x = fill_tile_ranges(shared.x, params.x, left, columns);
  // Of all taps, of those of a strip of rows, of a chunk: long chains of sums lose what is small
  // beside them.
  Real sum[kPlanes], strip[kPlanes], part[kPlanes];
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) sum[p] = no_taps(params.y);
  for (int64_t chunk_y = 0; chunk_y < taps_y; chunk_y += kResampleTaps) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) strip[p] = no_taps(params.y);
    for (int64_t chunk_x = 0; chunk_x < taps_x; chunk_x += kResampleTaps) {
      if (chunk_y + chunk_x > 0) __syncthreads();
      fill_tile_weights(shared.y, params.y, top, rows, chunk_y);
      fill_tile_weights(shared.x, params.x, left, columns, chunk_x);
      __syncthreads();
      if (!active) continue;
      const int count_y =
          static_cast<int>(resample_min(shared.y.count[i] - chunk_y, int64_t(kResampleTaps)));
      const int count_x =
          static_cast<int>(resample_min(shared.x.count[j] - chunk_x, int64_t(kResampleTaps)));
      const T* corner = params.in + first_plane * in_plane +
                        (shared.y.start[i] + chunk_y) * in_width + shared.x.start[j] + chunk_x;
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) part[p] = no_taps(params.y);
      for (int ky = 0; ky < count_y; ++ky) {
        for (int kx = 0; kx < count_x; ++kx) {
          const Real weight = shared.y.weight[i][ky] * shared.x.weight[j][kx];
          const T* source = corner + ky * in_width + kx;
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) {
            if (first_plane + p * slots < params.planes) {
              part[p] += weight * load_real<Real>(source + p * slots * in_plane);
            }
          }
        }
      }
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) strip[p] += part[p];
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) sum[p] += strip[p];
  }
  if (!active) return;
  T* target = params.out + first_plane * height * width + (top + i) * width + left + j;
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    if (first_plane + p * slots < params.planes) {
      store_real(target + p * slots * height * width, sum[p]);
    }
  }
}

// Chooses the tile and returns the number of blocks.
template <class T, class Real>
int64_t plan_resample2d(Resample2dCudaParams<T, Real>& params, int planes_per_thread) {
  const int64_t height = params.y.out_size(), width = params.x.out_size();
  params.tile_width = static_cast<int>(resample_min(width, kResampleTile));
  params.tile_height = static_cast<int>(
      resample_min(height, resample_min(kResampleThreads / params.tile_width, kResampleTile)));
  const int64_t slots = kResampleThreads / (params.tile_height * params.tile_width);
  const int64_t tiles = (height + params.tile_height - 1) / params.tile_height *
                        ((width + params.tile_width - 1) / params.tile_width);
  const int64_t planes_per_block = slots * planes_per_thread;
  return tiles * ((params.planes + planes_per_block - 1) / planes_per_block);
}

}  // namespace flexvar
