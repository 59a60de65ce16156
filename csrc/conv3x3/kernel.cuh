// conv3x3 on tensor cores, channels last, as a product of matrices (plan.h) whose left factor is
// never written down: asynchronous copies gather the pixels that a step of the depth needs, zeros
// where taps lie outside. Products of 16-bit elements are summed in fp32; bias and residual are
// added to that, and the result is rounded once.
#pragma once

#include "common/cuda.cuh"
#include "common/ptx.cuh"
#include "conv3x3/pack_weight.cuh"
#include "conv3x3/plan.h"

namespace flexvar {

constexpr int kConvThreads = 128;
constexpr int kConvChunk = 8;                                // elements of 16 bytes
constexpr int kConvChunks = kConvDepth / kConvChunk;         // of a row
constexpr int kConvRowsAtOnce = kConvThreads / kConvChunks;  // that a block copies

// Four warps of kWarpRows x kWarpColumns, kWarpsDown of them below each other.
template <int kWarpRows_, int kWarpColumns_, int kWarpsDown_>
struct ConvTile {
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kWarpsDown = kWarpsDown_;
  static constexpr int kRows = kWarpRows * kWarpsDown;
  static constexpr int kColumns = kWarpColumns * (kConvThreads / 32 / kWarpsDown);
  // Steps under way, within the 48 KiB that need no leave.
  static constexpr int kStages = kRows + kColumns > 192 ? 3 : 4;
  static constexpr int kBlocks = kRows + kColumns > 192 ? 2 : 4;  // registers for so many
};

// f(ConvTile) for the plan's tile.
template <class F>
void with_conv_tile(ConvTileSize size, const F& f) {
  switch (size) {
    case ConvTileSize::large:
      return f(ConvTile<64, 64, 2>());
    case ConvTileSize::small:
      return f(ConvTile<32, 32, 2>());
    default:
      return f(ConvTile<32, 32, 4>());
  }
}

template <class T>
struct Conv3x3CudaParams {
  Conv3x3Plan plan;
  const T* x;          // [B, H, W, C]
  const T* weight;     // packed
  const float* bias;   // packed
  const T* residual;   // as out, or null
  T* out;              // [B, h, w, N]
  bool out_in_chunks;  // out and residual allow 16 bytes at once
};

// Whether x can be copied in chunks of 16 bytes, or out be written so.
inline bool conv3x3_in_chunks(const void* data, int64_t channels) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && channels % kConvChunk == 0;
}

template <class T, class Tile>
struct ConvShared {
  alignas(128) T pixels[Tile::kStages][Tile::kRows][kConvDepth];
  alignas(128) T weight[Tile::kStages][Tile::kColumns][kConvDepth];
};

template <class T>
struct alignas(16) ConvChunk {
  T element[kConvChunk];
};

// Where a row of a shared tile holds a chunk: eight rows' lie in different banks.
__device__ __forceinline__ int conv_place(int row, int chunk) {
  return (chunk ^ (row / 2 % kConvChunks)) * kConvChunk;
}

// A pixel of the grid; beyond the last image where the block has rows to spare.
struct ConvPixel {
  int64_t image;
  int y, x;
};
// The first row of a block.
struct ConvStart {
  int64_t image;
  uint32_t pixel;
};
__device__ __forceinline__ ConvPixel conv_pixel(const Conv3x3Plan& plan, const ConvStart& start,
                                                int row) {
  const auto width = static_cast<uint32_t>(plan.grid_width);
  const uint32_t pixels = static_cast<uint32_t>(plan.grid_height) * width;
  const uint32_t index = start.pixel + static_cast<uint32_t>(row), pixel = index % pixels;
  return {start.image + index / pixels, static_cast<int>(pixel / width),
          static_cast<int>(pixel % width)};
}

// What a thread copies of the pixels: a chunk of channels of one tap, of rows kConvRowsAtOnce
// apart, and the same kConvDepth further on in the next step.
template <class Tile>
struct ConvReader {
  static constexpr int kCount = Tile::kRows / kConvRowsAtOnce;
  int64_t origins[kCount];  // the first tap's offset in x, perhaps outside
  int visible[kCount];      // bit i: the row i of taps is inside; bit 4 + i: the column i
  int tap_row, tap_column, channel;

  __device__ __forceinline__ ConvReader(const Conv3x3Plan& plan, const ConvStart& start,
                                        int row_parity, int column_parity) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const ConvPixel pixel = conv_pixel(plan, start, thread / kConvChunks + i * kConvRowsAtOnce);
      const int y = pixel.y * plan.stride - plan.padding + row_parity;
      const int x = pixel.x * plan.stride - plan.padding + column_parity;
      origins[i] = ((pixel.image * plan.height + y) * plan.width + x) * plan.in_channels;
      visible[i] = 0;
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        if (tap >= plan.side || pixel.image >= plan.batch) continue;
        if (y + tap >= 0 && y + tap < plan.height) visible[i] |= 1 << tap;
        if (x + tap >= 0 && x + tap < plan.width) visible[i] |= 16 << tap;
      }
    }
    tap_row = tap_column = 0;
    channel = thread % kConvChunks * kConvChunk;
    carry(plan);
  }

  __device__ __forceinline__ void advance(const Conv3x3Plan& plan) {
    channel += kConvDepth;
    carry(plan);
  }

  __device__ __forceinline__ void carry(const Conv3x3Plan& plan) {
#pragma unroll 1
    while (channel >= plan.padded_channels) {
      channel -= plan.padded_channels;
      if (++tap_column == plan.side) {
        tap_column = 0;
        ++tap_row;
      }
    }
  }

  template <bool kInChunks, class T>
  __device__ __forceinline__ void copy(T (&shared)[Tile::kRows][kConvDepth],
                                       const Conv3x3CudaParams<T>& params) const {
    const Conv3x3Plan& plan = params.plan;
    const int thread = static_cast<int>(threadIdx.x), first_row = thread / kConvChunks;
    const int place = conv_place(first_row, thread % kConvChunks);  // in all of the rows
    const int64_t tap = int64_t{tap_row * plan.width + tap_column} * plan.in_channels + channel;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid = (visible[i] >> tap_row & visible[i] >> (4 + tap_column) & 1) != 0;
      const T* const source = params.x + (valid ? origins[i] + tap : 0);
      T* const target = &shared[first_row + i * kConvRowsAtOnce][place];
      if constexpr (kInChunks) {
        ptx::cp_async<16>(target, source, valid);
      } else {
        ConvChunk<T> chunk;
#pragma unroll
        for (int j = 0; j < kConvChunk; ++j) {
          chunk.element[j] =
              valid && channel + j < plan.in_channels ? source[j] : from_float<T>(0.0f);
        }
        *reinterpret_cast<ConvChunk<T>*>(target) = chunk;
      }
    }
  }
};

template <class T, class Tile>
__device__ __forceinline__ void conv_copy_weight(T (&shared)[Tile::kColumns][kConvDepth],
                                                 const T* step, int64_t group_elements) {
  static_assert(kConvRowsAtOnce == kConvPackedColumns);
  const int thread = static_cast<int>(threadIdx.x), first_row = thread / kConvChunks;
#pragma unroll
  for (int row = 0; row < Tile::kColumns; row += kConvRowsAtOnce) {
    ptx::cp_async<16>(&shared[first_row + row][conv_place(first_row, thread % kConvChunks)],
                      step + row / kConvPackedColumns * group_elements + thread * kConvChunk);
  }
}

// sums += a step of the depth of this warp's part, from (warp_row, warp_column).
template <class T, class Tile, int kRowFragments, int kColumnFragments>
__device__ __forceinline__ void conv_multiply(float (&sums)[kRowFragments][kColumnFragments][4],
                                              const T (&pixels)[Tile::kRows][kConvDepth],
                                              const T (&weight)[Tile::kColumns][kConvDepth],
                                              int warp_row, int warp_column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = warp_row + lane % 16, column = warp_column + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int chunk = 0; chunk < kConvChunks; chunk += 2) {
    // The same place in rows 16 apart.
    const int left_place = conv_place(row, chunk + lane / 16);
    const int right_place = conv_place(column, chunk + lane / 8 % 2);
    uint32_t left[kRowFragments][4];
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m) {
      ptx::ldmatrix_x4(left[m], &pixels[row + m * 16][left_place]);
    }
#pragma unroll
    for (int n = 0; n < kColumnFragments; n += 2) {
      uint32_t right[4];
      ptx::ldmatrix_x4(right, &weight[column + n * 8][right_place]);
      const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m) {
        ptx::mma_m16n8k16<T>(sums[m][n], left[m], first);
        ptx::mma_m16n8k16<T>(sums[m][n + 1], left[m], second);
      }
    }
  }
}

// Four lanes hold two neighbouring columns each of four 8-column fragments; afterwards each holds
// the eight of the fragment of its number. All lanes of the warp take part.
__device__ __forceinline__ void conv_gather_columns(float (&values)[kConvChunk]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (t & distance) != 0;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      if ((pair & distance) != 0) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = values[2 * pair + i], high = values[2 * (pair + distance) + i];
        const float received = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
        values[2 * pair + i] = upper ? received : low;
        values[2 * (pair + distance) + i] = upper ? high : received;
      }
    }
  }
}

// Columns [column, column + 8) of the residual of an output pixel, whose first element is at
// `offset`: those that there are.
template <class T>
__device__ __forceinline__ ConvChunk<T> conv_load_residual(const Conv3x3CudaParams<T>& params,
                                                           int64_t offset, int column) {
  ConvChunk<T> residual{};
  const int count = params.plan.out_channels - column;
  if (params.residual == nullptr || count <= 0) return residual;
  const T* const source = params.residual + offset + column;
  if (params.out_in_chunks) return *reinterpret_cast<const ConvChunk<T>*>(source);
#pragma unroll
  for (int i = 0; i < kConvChunk; ++i) {
    if (i < count) residual.element[i] = source[i];
  }
  return residual;
}

// The same columns of the output pixel.
template <class T>
__device__ __forceinline__ void conv_store(const Conv3x3CudaParams<T>& params,
                                           const float (&sums)[kConvChunk],
                                           const ConvChunk<T>& residual, int64_t offset,
                                           int column) {
  const int count = params.plan.out_channels - column;
  if (count <= 0) return;
  T* const target = params.out + offset + column;
  ConvChunk<T> out;
#pragma unroll
  for (int i = 0; i < kConvChunk; i += 4) {
    const float4 bias = *reinterpret_cast<const float4*>(params.bias + column + i);
    const float biases[4] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float value = sums[i + j] + biases[j];
      if (params.residual != nullptr) value += to_float(residual.element[i + j]);
      out.element[i + j] = from_float<T>(value);
    }
  }
  if (params.out_in_chunks) {
    *reinterpret_cast<ConvChunk<T>*>(target) = out;
    return;
  }
#pragma unroll
  for (int i = 0; i < kConvChunk; ++i) {
    if (i < count) target[i] = out.element[i];
  }
}

// Blocks that read the same pixels follow each other: phases first, then tiles of columns, then of
// pixels.
struct ConvBlock {
  int phase, row_parity, column_parity, column_tile;
  unsigned tile;
};
__device__ __forceinline__ ConvBlock conv_block(const Conv3x3Plan& plan) {
  const auto phases = static_cast<unsigned>(plan.parities * plan.parities);
  const auto column_tiles = static_cast<unsigned>(plan.column_tiles);
  const auto phase = static_cast<int>(blockIdx.x % phases);
  return {phase, phase / plan.parities, phase % plan.parities,
          static_cast<int>(blockIdx.x / phases % column_tiles), blockIdx.x / phases / column_tiles};
}

template <class T, class Tile, bool kInChunks>
__global__ void __launch_bounds__(kConvThreads, Tile::kBlocks)
    conv3x3_kernel(Conv3x3CudaParams<T> params) {
  constexpr int kRowFragments = Tile::kWarpRows / 16, kColumnFragments = Tile::kWarpColumns / 8;
  auto& shared = shared_storage<ConvShared<T, Tile>>();
  const Conv3x3Plan& plan = params.plan;
  const auto [phase, row_parity, column_parity, column_tile, tile] = conv_block(plan);
  const int64_t row_tile = tile;

  const int64_t pixels = int64_t{plan.grid_height} * plan.grid_width;
  const ConvStart start{row_tile * Tile::kRows / pixels,
                        static_cast<uint32_t>(row_tile * Tile::kRows % pixels)};
  ConvReader<Tile> reader(plan, start, row_parity, column_parity);
  const T* weight = params.weight + plan.tile_place(phase, column_tile);
  const int64_t group_elements = plan.group_elements();
  const auto copy_step = [&](int stage) {
    reader.template copy<kInChunks>(shared.pixels[stage], params);
    conv_copy_weight<T, Tile>(shared.weight[stage], weight, group_elements);
    reader.advance(plan);
    weight += kConvPackedColumns * kConvDepth;
  };
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < plan.depth_steps) copy_step(step);
    ptx::cp_async_commit();
  }

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp % Tile::kWarpsDown * Tile::kWarpRows;
  const int warp_column = warp / Tile::kWarpsDown * Tile::kWarpColumns;
  float sums[kRowFragments][kColumnFragments][4] = {};
  int stage = 0, next_stage = Tile::kStages - 1;
  for (int step = 0; step < plan.depth_steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // and everybody is done with the stage before
    if (step + Tile::kStages - 1 < plan.depth_steps) copy_step(next_stage);
    ptx::cp_async_commit();
    conv_multiply<T, Tile>(sums, shared.pixels[stage], shared.weight[stage], warp_row, warp_column);
    next_stage = stage;
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first_column = column_tile * Tile::kColumns + warp_column + lane % 4 * kConvChunk;
#pragma unroll
  for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ConvPixel pixel = conv_pixel(plan, start, warp_row + m * 16 + half * 8 + lane / 4);
      const int64_t row = (pixel.image * plan.grid_height + pixel.y) * plan.parities + row_parity;
      const int64_t offset =
          ((row * plan.grid_width + pixel.x) * plan.parities + column_parity) * plan.out_channels;
#pragma unroll
      for (int n = 0; n < kColumnFragments; n += 4) {
        float values[kConvChunk];
#pragma unroll
        for (int i = 0; i < kConvChunk; ++i) values[i] = sums[m][n + i / 2][2 * half + i % 2];
        conv_gather_columns(values);
        if (pixel.image >= plan.batch) continue;
        const int column = first_column + n * 8;
        conv_store(params, values, conv_load_residual(params, offset, column), offset, column);
      }
    }
  }
}

}  // namespace flexvar
