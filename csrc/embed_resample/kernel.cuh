// embed_resample and its backward. The forward gathers the (normalised) codes that a tile of tokens
// needs into shared memory and resamples them there; its adjoint does the same with the gradients
// of the tokens, and two more kernels sum the cells of each code, however many of them one code
// has. No atomics, every sum in a fixed order.
#pragma once

#include "common/cuda.cuh"
#include "embed_resample/norm.h"
#include "resample/taps.cuh"

namespace flexvar {

constexpr int kEmbedWarps = 8;
constexpr int kEmbedThreads = 32 * kEmbedWarps;
constexpr int kEmbedTile = 8;       // a block's tile of outputs: a row for each warp
constexpr int kEmbedChannels = 32;  // a block's channels: a lane for each
static_assert(kEmbedTile == kEmbedWarps);

// Side of the square of sources in shared memory: enough for a bicubic upsampling's tile at once.
template <class Real>
constexpr int kEmbedPatch = sizeof(Real) == sizeof(double) ? 8 : 12;

template <class T, class Real>
struct EmbedSource {
  const int64_t* indices;  // [B, H, W] codes to gather, or null: `values` are the sources
  const T* values;         // codebook [num_codes, dim], or [B, H * W, dim]
  int64_t num_codes;
  bool normalize;
};

template <class T, class Real, class Out>
struct EmbedResampleCudaParams {
  EmbedSource<T, Real> source;
  Out* out;  // [B, y.out_size() * x.out_size(), dim]
  int64_t batch;
  int64_t dim;
  TapAxis<Real> y, x;
};

template <class Real>
struct EmbedStorage {
  Real patch[kEmbedPatch<Real>][kEmbedPatch<Real>][kEmbedChannels];
  Real weight_y[kEmbedTile][kEmbedPatch<Real>];
  Real weight_x[kEmbedTile][kEmbedPatch<Real>];
  int64_t start_y[kEmbedTile], end_y[kEmbedTile];
  int64_t start_x[kEmbedTile], end_x[kEmbedTile];
};

template <class Real>
__device__ __forceinline__ Real sum_of_warp(Real x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// 1 / max(|code|, kMinCodeNorm), for all lanes of the warp that calls it.
template <class T, class Real>
__device__ Real inverse_norm(const T* code, int64_t dim) {
  Real squares = 0;
  for (int64_t c = threadIdx.x % 32; c < dim; c += 32) {
    const Real x = load_real<Real>(code + c);
    squares += x * x;
  }
  const Real norm = sqrt(sum_of_warp(squares));
  return Real(1) / (norm > Real(kMinCodeNorm) ? norm : Real(kMinCodeNorm));
}

// The warp's channels of one source: its lane's value, NaN where the index is not a code.
template <class T, class Real>
__device__ Real load_source(const EmbedSource<T, Real>& source, int64_t cell, int64_t channel,
                            int64_t dim) {
  if (source.indices == nullptr) {
    return channel < dim ? load_real<Real>(source.values + cell * dim + channel) : Real(0);
  }
  const int64_t index = source.indices[cell];
  if (index < 0 || index >= source.num_codes) return Real(NAN);
  const T* code = source.values + index * dim;
  const Real scale = source.normalize ? inverse_norm<T, Real>(code, dim) : Real(1);
  return channel < dim ? scale * load_real<Real>(code + channel) : Real(0);
}

// Weights of the sources [begin, begin + kEmbedPatch) for each output of the tile, where they lie
// in the output's range.
template <class Real>
__device__ void fill_patch_weights(Real (&weight)[kEmbedTile][kEmbedPatch<Real>],
                                   const int64_t (&start)[kEmbedTile],
                                   const int64_t (&end)[kEmbedTile], const TapAxis<Real>& taps,
                                   int64_t first, int size, int64_t begin) {
  constexpr int patch = kEmbedPatch<Real>;
  for (int j = static_cast<int>(threadIdx.x); j < size * patch; j += kEmbedThreads) {
    const int i = j / patch, k = j % patch;
    if (begin + k >= start[i] && begin + k < end[i]) {
      weight[i][k] = tap_weight(taps, first + i, begin + k);
    }
  }
}

template <class T, class Real, class Out>
__global__ void __launch_bounds__(kEmbedThreads, 2)
    embed_resample_kernel(EmbedResampleCudaParams<T, Real, Out> params) {
  constexpr int patch = kEmbedPatch<Real>;
  auto& shared = shared_storage<EmbedStorage<Real>>();
  const int64_t height = params.y.out_size(), width = params.x.out_size();
  const int64_t in_height = params.y.in_size(), in_width = params.x.in_size();
  const int64_t tiles_x = (width + kEmbedTile - 1) / kEmbedTile;
  const int64_t tiles_y = (height + kEmbedTile - 1) / kEmbedTile;
  int64_t block = blockIdx.x;
  const int64_t left = block % tiles_x * kEmbedTile;
  block /= tiles_x;
  const int64_t top = block % tiles_y * kEmbedTile;
  block /= tiles_y;
  const int64_t image = block % params.batch;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t channel = block / params.batch * kEmbedChannels + lane;
  const int rows = static_cast<int>(resample_min(kEmbedTile, height - top));
  const int columns = static_cast<int>(resample_min(kEmbedTile, width - left));

  if (threadIdx.x < static_cast<unsigned>(rows)) {
    const TapRange range = tap_range(params.y, top + threadIdx.x);
    shared.start_y[threadIdx.x] = range.start;
    shared.end_y[threadIdx.x] = range.start + range.count;
  } else if (threadIdx.x >= 32 && threadIdx.x < static_cast<unsigned>(32 + columns)) {
    const int j = static_cast<int>(threadIdx.x) - 32;
    const TapRange range = tap_range(params.x, left + j);
    shared.start_x[j] = range.start;
    shared.end_x[j] = range.start + range.count;
  }
  __syncthreads();

  Real sum[kEmbedTile];
#pragma unroll
  for (int j = 0; j < kEmbedTile; ++j) sum[j] = no_taps(params.y);
  const int64_t last_y = shared.end_y[rows - 1], last_x = shared.end_x[columns - 1];
  for (int64_t y0 = shared.start_y[0]; y0 < last_y; y0 += patch) {
    for (int64_t x0 = shared.start_x[0]; x0 < last_x; x0 += patch) {
      if (y0 > shared.start_y[0] || x0 > shared.start_x[0]) __syncthreads();
      fill_patch_weights(shared.weight_y, shared.start_y, shared.end_y, params.y, top, rows, y0);
      fill_patch_weights(shared.weight_x, shared.start_x, shared.end_x, params.x, left, columns,
                         x0);
      const int patch_rows = static_cast<int>(resample_min(patch, last_y - y0));
      const int patch_columns = static_cast<int>(resample_min(patch, last_x - x0));
      for (int cell = warp; cell < patch_rows * patch_columns; cell += kEmbedWarps) {
        const int r = cell / patch_columns, s = cell % patch_columns;
        shared.patch[r][s][lane] = load_source(
            params.source, (image * in_height + y0 + r) * in_width + x0 + s, channel, params.dim);
      }
      __syncthreads();
      if (warp >= rows) continue;
      const int first_row = static_cast<int>(resample_max(shared.start_y[warp] - y0, 0));
      const int end_row = static_cast<int>(resample_min(shared.end_y[warp] - y0, patch));
#pragma unroll
      for (int j = 0; j < kEmbedTile; ++j) {
        if (j >= columns) continue;
        const int first_column = static_cast<int>(resample_max(shared.start_x[j] - x0, 0));
        const int end_column = static_cast<int>(resample_min(shared.end_x[j] - x0, patch));
        for (int r = first_row; r < end_row; ++r) {
          for (int s = first_column; s < end_column; ++s) {
            sum[j] += shared.weight_y[warp][r] * shared.weight_x[j][s] * shared.patch[r][s][lane];
          }
        }
      }
    }
  }
  if (warp >= rows || channel >= params.dim) return;
  Out* out = params.out + ((image * height + top + warp) * width + left) * params.dim + channel;
#pragma unroll
  for (int j = 0; j < kEmbedTile; ++j) {
    if (j < columns) store_real(out + j * params.dim, sum[j]);
  }
}

template <class T, class Real, class Out>
int64_t embed_resample_blocks(const EmbedResampleCudaParams<T, Real, Out>& params) {
  return (params.x.out_size() + kEmbedTile - 1) / kEmbedTile *
         ((params.y.out_size() + kEmbedTile - 1) / kEmbedTile) * params.batch *
         ((params.dim + kEmbedChannels - 1) / kEmbedChannels);
}

// Cells that a warp sums, consecutive ones of the sorted: a code of many cells has many warps.
constexpr int64_t kEmbedRun = 64;

template <class T, class Real>
struct EmbedScatterCudaParams {
  const Real* grad_grid;  // [cells, dim]
  const int64_t* sorted;  // [cells]: the cells' codes, ascending
  const int64_t* cells;   // [cells]: where they stood, ascending within a code
  const T* codebook;      // [num_codes, dim]
  Real* run_sums;         // [runs(), dim]: of the cells whose code began in an earlier run
  Real* grad_codebook;    // [num_codes, dim]
  int64_t num_cells;
  int64_t num_codes;
  int64_t dim;
  bool normalize;

  __host__ __device__ int64_t runs() const { return (num_cells + kEmbedRun - 1) / kEmbedRun; }
};

// A warp for each run: of every code in it the sum of the cells' gradients.
template <class T, class Real>
__global__ void __launch_bounds__(kEmbedThreads, 2)
    embed_sum_runs_kernel(EmbedScatterCudaParams<T, Real> params) {
  const int64_t run = blockIdx.x * static_cast<int64_t>(kEmbedWarps) + threadIdx.x / 32;
  if (run >= params.runs()) return;
  const int64_t begin = run * kEmbedRun;
  const int64_t run_end = resample_min(begin + kEmbedRun, params.num_cells);
  for (int64_t first = begin, end = begin; first < run_end; first = end) {
    const int64_t v = params.sorted[first];
    while (end < run_end && params.sorted[end] == v) ++end;
    if (v < 0 || v >= params.num_codes) continue;
    const bool began_before = first == begin && begin > 0 && params.sorted[begin - 1] == v;
    Real* const out =
        began_before ? params.run_sums + run * params.dim : params.grad_codebook + v * params.dim;
    for (int64_t c = threadIdx.x % 32; c < params.dim; c += 32) {
      Real sum = 0;
#pragma unroll 4
      for (int64_t i = first; i < end; ++i) {
        sum += params.grad_grid[params.cells[i] * params.dim + c];
      }
      out[c] = sum;
    }
  }
}

// The first of `sorted` that is not below `value`.
__device__ inline int64_t lower_bound(const int64_t* sorted, int64_t count, int64_t value) {
  int64_t first = 0;
  while (first < count) {
    const int64_t middle = first + (count - first) / 2;
    if (sorted[middle] < value) {
      first = middle + 1;
    } else {
      count = middle;
    }
  }
  return first;
}

// A warp for each code, after the runs: the sum g of all its cells' gradients and, with e = c / n,
// n = max(|c|, kMinCodeNorm), the gradient (g - e (e . g)) / n through the normalisation, or g / n
// where the norm is clamped.
template <class T, class Real>
__global__ void __launch_bounds__(kEmbedThreads, 2)
    embed_scatter_kernel(EmbedScatterCudaParams<T, Real> params) {
  const int64_t v = blockIdx.x * static_cast<int64_t>(kEmbedWarps) + threadIdx.x / 32;
  if (v >= params.num_codes) return;
  const int64_t dim = params.dim;
  const int64_t lane = threadIdx.x % 32;
  Real* out = params.grad_codebook + v * dim;
  const int64_t first = lower_bound(params.sorted, params.num_cells, v);
  const int64_t end = lower_bound(params.sorted, params.num_cells, v + 1);
  const T* code = params.codebook + v * dim;
  Real product = 0;
  for (int64_t c = lane; c < dim; c += 32) {
    Real sum = first == end ? Real(0) : out[c];
#pragma unroll 4
    for (int64_t run = first / kEmbedRun + 1; run * kEmbedRun < end; ++run) {
      sum += params.run_sums[run * dim + c];
    }
    out[c] = sum;
    product += sum * load_real<Real>(code + c);
  }
  if (!params.normalize || first == end) return;
  const Real inverse = inverse_norm<T, Real>(code, dim);
  const bool clamped = inverse >= Real(1 / kMinCodeNorm);
  const Real along = clamped ? Real(0) : sum_of_warp(product) * inverse * inverse;
  for (int64_t c = lane; c < dim; c += 32) {
    out[c] = inverse * (out[c] - along * load_real<Real>(code + c));
  }
}

}  // namespace flexvar
