// embed_resample and its backward. The forward gathers the (normalised) codes that a tile of tokens
// needs into shared memory and resamples them there; its adjoint does the same with the gradients
// of the tokens, and two more kernels sum the cells of each code, however many of them one code
// has. No atomics, every sum in a fixed order.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/divide_up.h"
#include "common/fast_divisor.h"
#include "common/inverse_length.h"
#include "common/ptx.cuh"
#include "resample/taps.cuh"

namespace flexvar {

// 8 lanes of a warp own an output, and before that a source: lane l has channels l, l + 8, l + 16
// and l + 24 of the block's 32. Each access of a warp to memory then is four whole sectors (of
// float), whatever the number of channels and the alignment.
constexpr unsigned kEmbedTile = 8;  // side of a block's tile of outputs
constexpr unsigned kEmbedLanes = 8, kEmbedLaneChannels = 4;
constexpr unsigned kEmbedChannels = kEmbedLanes * kEmbedLaneChannels;
constexpr unsigned kEmbedSlots = kEmbedTile * kEmbedTile;  // outputs, or sources, at once
constexpr unsigned kEmbedThreads = kEmbedSlots * kEmbedLanes;

// Side of the square of sources in shared memory: enough for a bicubic upsampling's tile at once.
template <class Real>
constexpr unsigned kEmbedPatch = sizeof(Real) == sizeof(double) ? 8 : 12;

template <class T, class Real, bool kAdjoint>
struct EmbedResampleCudaParams {
  using Out = std::conditional_t<kAdjoint, Real, T>;
  const int64_t* indices;  // [B, H, W] of the rows to gather; the adjoint has all, in their order
  const T* rows;           // [num_rows, dim]: the codebook, or gradients of the tokens
  Out* out;                // [B, h * w, dim]
  int64_t num_rows;
  int64_t dim;
  bool normalize;
  ResampleAxis<Real> y, x;
  FastDivisor tiles_x, tiles_y, batch;  // of a block's number, in this order; then the channels
};

template <class Real>
struct EmbedTileAxis {
  unsigned start[kEmbedTile], end[kEmbedTile];  // the sources of each output
  Real weight[kEmbedTile][kEmbedPatch<Real>];   // of those in the patch
};

template <class Real>
struct alignas(kEmbedLaneChannels * sizeof(Real)) EmbedLane {
  Real x[kEmbedLaneChannels];
};

template <class Real>
struct EmbedStorage {
  EmbedLane<Real> patch[kEmbedPatch<Real>][kEmbedPatch<Real>][kEmbedLanes];
  EmbedTileAxis<Real> y, x;
};

// A lane's channels of a row, from `first` on, of which the row has `count`; 0 for others.
template <class Real, class T>
__device__ __forceinline__ EmbedLane<Real> load_lane(const T* first, unsigned count) {
  EmbedLane<Real> lane;
#pragma unroll
  for (unsigned k = 0; k < kEmbedLaneChannels; ++k) {
    lane.x[k] = k * kEmbedLanes < count ? load_real<Real>(first + k * kEmbedLanes) : Real(0);
  }
  return lane;
}

// Of `size` channels those from `first` on, as far as a block has them.
__device__ __forceinline__ unsigned channels_from(int64_t first, int64_t size) {
  return static_cast<unsigned>(resample_min(resample_max(size - first, 0), kEmbedChannels));
}

template <class Real>
__device__ __forceinline__ Real inverse_norm(Real squares) {
  return inverse_length(sqrt(squares));
}

// Of a row (none: null) of which the lane's channels in the block are here; longer ones are read
// anew. Adds in the order of inverse_norm_of_code.
template <class T, class Real>
__device__ __forceinline__ Real inverse_norm_of_row(const EmbedLane<Real>& lane, const T* row,
                                                    int64_t dim) {
  Real squares[kEmbedLaneChannels];
#pragma unroll
  for (unsigned k = 0; k < kEmbedLaneChannels; ++k) squares[k] = lane.x[k] * lane.x[k];
  if (dim > kEmbedChannels && row != nullptr) {
#pragma unroll
    for (unsigned k = 0; k < kEmbedLaneChannels; ++k) squares[k] = 0;
#pragma unroll 1
    for (int64_t c = threadIdx.x % kEmbedLanes; c < dim; c += kEmbedChannels) {
      const EmbedLane<Real> part = load_lane<Real>(row + c, channels_from(c, dim));
#pragma unroll
      for (unsigned k = 0; k < kEmbedLaneChannels; ++k) squares[k] += part.x[k] * part.x[k];
    }
  }
  Real sum = (squares[0] + squares[2]) + (squares[1] + squares[3]);
#pragma unroll
  for (unsigned offset = kEmbedLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  return inverse_norm(sum);
}

// To the sums of output (i, j) of the tile what lies in the patch from source (y0, x0) on.
template <class Real>
__device__ __forceinline__ void add_patch(EmbedLane<Real>& sum, const EmbedStorage<Real>& shared,
                                          unsigned i, unsigned j, unsigned lane, unsigned y0,
                                          unsigned x0) {
  constexpr unsigned patch = kEmbedPatch<Real>;
  const unsigned first_y = max(shared.y.start[i], y0), end_y = min(shared.y.end[i], y0 + patch);
  const unsigned first_x = max(shared.x.start[j], x0), end_x = min(shared.x.end[j], x0 + patch);
  for (unsigned y = first_y; y < end_y; ++y) {
    const Real weight_y = shared.y.weight[i][y - y0];
#pragma unroll 4
    for (unsigned x = first_x; x < end_x; ++x) {
      const Real weight = weight_y * shared.x.weight[j][x - x0];
      const EmbedLane<Real> source = shared.patch[y - y0][x - x0][lane];
#pragma unroll
      for (unsigned k = 0; k < kEmbedLaneChannels; ++k) sum.x[k] += weight * source.x[k];
    }
  }
}

template <class T, class Real, bool kAdjoint>
__global__ void __launch_bounds__(kEmbedThreads, 2)
    embed_resample_kernel(EmbedResampleCudaParams<T, Real, kAdjoint> params) {
  constexpr unsigned patch = kEmbedPatch<Real>;
  // Sources of a lane under way at once: two are all that a tile of an upsampling has.
  constexpr unsigned ahead = patch * patch > kEmbedSlots ? 2 : 1;
  static_assert(kEmbedTile * patch <= kEmbedThreads / 2);
  auto& shared = shared_storage<EmbedStorage<Real>>();
  ptx::griddepcontrol_launch_dependents();
  const unsigned row_of_tiles = params.tiles_x.quotient(blockIdx.x);
  const unsigned left = params.tiles_x.remainder(blockIdx.x) * kEmbedTile;
  const unsigned image_and_channels = params.tiles_y.quotient(row_of_tiles);
  const unsigned top = params.tiles_y.remainder(row_of_tiles) * kEmbedTile;
  const int64_t image = params.batch.remainder(image_and_channels);
  const unsigned lane = threadIdx.x % kEmbedLanes;
  const unsigned slot = threadIdx.x / kEmbedLanes;
  const int64_t channel =
      int64_t{params.batch.quotient(image_and_channels)} * kEmbedChannels + lane;
  const unsigned channels = channels_from(channel, params.dim);
  const TapAxis<Real> taps_y{params.y, kAdjoint}, taps_x{params.x, kAdjoint};
  const unsigned rows = static_cast<unsigned>(resample_min(taps_y.out_size() - top, kEmbedTile));
  const unsigned columns =
      static_cast<unsigned>(resample_min(taps_x.out_size() - left, kEmbedTile));

  // Each half of the block calls body(tile, taps, first output, outputs, number of the thread) for
  // an axis. What it takes of the parameters is computed anew: in registers it would be too much.
  const auto for_axes = [&](const auto& body) {
    const unsigned thread = ptx::computed_here(static_cast<int>(threadIdx.x));
    const bool of_x = thread >= kEmbedThreads / 2;
    const TapAxis<Real> taps{of_x ? params.x : params.y, kAdjoint};
    body(of_x ? shared.x : shared.y, taps, of_x ? left : top, of_x ? columns : rows,
         thread % (kEmbedThreads / 2));
  };
  for_axes([](EmbedTileAxis<Real>& tile, const TapAxis<Real>& taps, unsigned first_output,
              unsigned outputs, unsigned number) {
    if (number >= outputs) return;
    const TapRange range = tap_range(taps, first_output + number);
    tile.start[number] = static_cast<unsigned>(range.start);
    tile.end[number] = static_cast<unsigned>(range.start + range.count);
  });
  __syncthreads();
  ptx::griddepcontrol_wait();

  const unsigned i = slot / kEmbedTile, j = slot % kEmbedTile;
  const bool active = i < rows && j < columns;
  EmbedLane<Real> sum;
#pragma unroll
  for (unsigned k = 0; k < kEmbedLaneChannels; ++k) sum.x[k] = no_taps(taps_y);
  const unsigned first_y = shared.y.start[0], last_y = shared.y.end[rows - 1];
  const unsigned first_x = shared.x.start[0], last_x = shared.x.end[columns - 1];
  for (unsigned y0 = first_y; y0 < last_y; y0 += patch) {
    for (unsigned x0 = first_x; x0 < last_x; x0 += patch) {
      const unsigned patch_columns = min(last_x - x0, patch);
      const unsigned cells = min(last_y - y0, patch) * patch_columns;
      const unsigned reciprocal = 0xffffu / patch_columns + 1;  // exact for so few cells
      if (y0 > first_y || x0 > first_x) __syncthreads();        // the patch before has been read
#pragma unroll 1
      for (unsigned base = 0; base < cells; base += ahead * kEmbedSlots) {
        int64_t row[ahead];
#pragma unroll
        for (unsigned n = 0; n < ahead; ++n) {
          const unsigned cell = base + n * kEmbedSlots + slot, r = cell * reciprocal >> 16;
          row[n] = -1;
          if (cell < cells) {
            row[n] = (image * taps_y.in_size() + y0 + r) * taps_x.in_size() + x0 + cell -
                     r * patch_columns;
            if constexpr (!kAdjoint) row[n] = params.indices[row[n]];
          }
        }
        // The weights, while the indices are under way.
        if (base == 0) {
          for_axes([&](EmbedTileAxis<Real>& tile, const TapAxis<Real>& taps, unsigned first_output,
                       unsigned outputs, unsigned number) {
            const unsigned output = number / patch, column = number % patch;
            const unsigned source = (&tile == &shared.x ? x0 : y0) + column;
            if (output < outputs && source >= tile.start[output] && source < tile.end[output]) {
              tile.weight[output][column] = tap_weight(taps, first_output + output, source);
            }
          });
        }
        EmbedLane<Real> values[ahead];
#pragma unroll
        for (unsigned n = 0; n < ahead; ++n) {
          if (row[n] < 0 || row[n] >= params.num_rows) {
            row[n] = -1;
#pragma unroll
            for (unsigned k = 0; k < kEmbedLaneChannels; ++k) values[n].x[k] = Real(NAN);
          } else {
            values[n] = load_lane<Real>(params.rows + row[n] * params.dim + channel, channels);
          }
        }
#pragma unroll
        for (unsigned n = 0; n < ahead; ++n) {
          const unsigned cell = base + n * kEmbedSlots + slot, r = cell * reciprocal >> 16;
          if (base + n * kEmbedSlots >= cells) break;
          if (!kAdjoint && params.normalize) {
            const T* all = row[n] < 0 ? nullptr : params.rows + row[n] * params.dim;
            const Real scale = inverse_norm_of_row(values[n], all, params.dim);
#pragma unroll
            for (unsigned k = 0; k < kEmbedLaneChannels; ++k) values[n].x[k] *= scale;
          }
          if (cell < cells) shared.patch[r][cell - r * patch_columns][lane] = values[n];
        }
      }
      __syncthreads();
      if (active) add_patch(sum, shared, i, j, lane, y0, x0);
    }
  }
  if (!active) return;
  const int64_t token = (image * taps_y.out_size() + top + i) * taps_x.out_size() + left + j;
  typename EmbedResampleCudaParams<T, Real, kAdjoint>::Out* out =
      params.out + token * params.dim + channel;
#pragma unroll
  for (unsigned k = 0; k < kEmbedLaneChannels; ++k) {
    if (k * kEmbedLanes < channels) store_real(out + k * kEmbedLanes, sum.x[k]);
  }
}

constexpr int kEmbedWarps = 8;  // of a block that sums cells
constexpr int kEmbedSumThreads = 32 * kEmbedWarps;

// Cells that a warp sums, consecutive ones of the sorted: a code of many cells has many warps.
constexpr int64_t kEmbedRun = 64;
constexpr int kEmbedAhead = 8;  // whose gradients are under way at once

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

  __host__ __device__ int64_t runs() const { return divide_up(num_cells, kEmbedRun); }
};

// A warp for each run: of every code in it the sum of the cells' gradients.
template <class T, class Real>
__global__ void __launch_bounds__(kEmbedSumThreads, 2)
    embed_sum_runs_kernel(EmbedScatterCudaParams<T, Real> params) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const int64_t run = blockIdx.x * static_cast<int64_t>(kEmbedWarps) + threadIdx.x / 32;
  if (run >= params.runs()) return;
  const int64_t lane = threadIdx.x % 32, dim = params.dim;
  const int64_t begin = run * kEmbedRun;
  const int64_t end = resample_min(begin + kEmbedRun, params.num_cells);
  // The code whose sum an earlier run has begun, if it is one.
  const int64_t before = begin > 0 ? params.sorted[begin - 1] : -1;
  for (int64_t channel = 0; channel < dim; channel += 32) {
    const int64_t c = channel + lane;
    Real sum = 0;
    for (int64_t first = begin; first < end; first += 32) {
      // Each lane looks at a cell: where its gradient is, whether it is the last of its code's in
      // the run, and where the sum goes then.
      const int64_t i = first + lane, v = i < end ? params.sorted[i] : -1;
      const int64_t from = i < end ? params.cells[i] * dim : 0;
      const unsigned last =
          __ballot_sync(0xffffffffu, i + 1 == end || (i + 1 < end && params.sorted[i + 1] != v));
      Real* const target = v < 0 || v >= params.num_codes ? nullptr
                           : v == before                  ? params.run_sums + run * dim
                                                          : params.grad_codebook + v * dim;
#pragma unroll 1
      for (int next = 0; next < 32; next += kEmbedAhead) {
        Real grad[kEmbedAhead];
#pragma unroll
        for (int k = 0; k < kEmbedAhead; ++k) {
          const Real* source = params.grad_grid + __shfl_sync(0xffffffffu, from, next + k);
          grad[k] = first + next + k < end && c < dim ? source[c] : Real(0);
        }
#pragma unroll
        for (int k = 0; k < kEmbedAhead; ++k) {
          sum += grad[k];
          if ((last >> (next + k) & 1) == 0) continue;
          Real* const out = reinterpret_cast<Real*>(
              __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(target), next + k));
          if (out != nullptr && c < dim) out[c] = sum;
          sum = 0;
        }
      }
    }
  }
}

// The first of `sorted` that is not below `value`, which all lanes of the warp look for.
__device__ inline int64_t lower_bound(const int64_t* sorted, int64_t count, int64_t value) {
  int64_t first = 0, end = count;
  while (first < end) {
    const int64_t step = divide_up(end - first, 32), i = first + (threadIdx.x % 32 + 1) * step - 1;
    first += __popc(__ballot_sync(0xffffffffu, i < end && sorted[i] < value)) * step;
    end = resample_min(end, first + step - 1);
  }
  return first;
}

template <class Real>
__device__ __forceinline__ Real sum_of_warp(Real x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <class T, class Real>
__device__ Real inverse_norm_of_code(const T* code, int64_t dim) {
  Real squares = 0;
  for (int64_t c = threadIdx.x % 32; c < dim; c += 32) {
    const Real x = load_real<Real>(code + c);
    squares += x * x;
  }
  return inverse_norm(sum_of_warp(squares));
}

// A warp for each code, after the runs: the sum g of all its cells' gradients and, with e = c / n,
// n = max(|c|, 1e-12), the gradient (g - e (e . g)) / n through the normalisation, or g / n
// where the norm is clamped.
template <class T, class Real>
__global__ void __launch_bounds__(kEmbedSumThreads, 2)
    embed_scatter_kernel(EmbedScatterCudaParams<T, Real> params) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const int64_t v = blockIdx.x * static_cast<int64_t>(kEmbedWarps) + threadIdx.x / 32;
  if (v >= params.num_codes) return;
  const int64_t dim = params.dim;
  const int64_t lane = threadIdx.x % 32;
  Real* out = params.grad_codebook + v * dim;
  const int64_t first = lower_bound(params.sorted, params.num_cells, v);
  const int64_t beside = first + lane;  // most codes have few cells
  int64_t end = first + __popc(__ballot_sync(
                            0xffffffffu, beside < params.num_cells && params.sorted[beside] == v));
  if (end == first + 32) end += lower_bound(params.sorted + end, params.num_cells - end, v + 1);
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
  const Real inverse = inverse_norm_of_code<T, Real>(code, dim);
  const bool clamped = inverse >= inverse_length(Real(0));
  const Real along = clamped ? Real(0) : sum_of_warp(product) * inverse * inverse;
  for (int64_t c = lane; c < dim; c += 32) {
    out[c] = inverse * (out[c] - along * load_real<Real>(code + c));
  }
}

}  // namespace flexvar
