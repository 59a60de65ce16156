// conv3x3 by products of warpgroups (sm_90a). A block takes a rectangle of pixels, brings all that
// their taps see of 64 channels into shared memory once, and multiplies from there: the pixels of a
// tap are the same rows of chunks, that many pixels further on. So pixels take a fraction of the
// way that gathering them for every tap would, and no tap asks whether it lies outside.
#pragma once

#include "conv3x3/kernel.cuh"

namespace flexvar {

// kSide taps a side. Every warpgroup multiplies kSquares squares of 8 x 8 pixels.
template <ConvTileSize kSize, int kSide_, int kSquares_, int kBlocks_>
struct ConvWarpgroupTile {
  static constexpr int kSide = kSide_, kTaps = kSide * kSide, kSquares = kSquares_;
  static constexpr int kBlocks = kBlocks_;  // that are to fit on a multiprocessor
  static constexpr int kHeight = conv_tile_shape(kSize).height;
  static constexpr int kWidth = conv_tile_shape(kSize).width;
  static constexpr int kColumns = conv_tile_shape(kSize).columns;
  static constexpr int kThreads = kHeight * kWidth / (64 * kSquares) * 128;
  // What the taps see.
  static constexpr int kSeenWidth = kWidth + kSide - 1;
  static constexpr int kSeen = kSeenWidth * (kHeight + kSide - 1);
};

// f(ConvWarpgroupTile) for the plan's tile.
template <int kSide, class F>
void with_conv_warpgroup_tile(ConvTileSize size, const F& f) {
  using enum ConvTileSize;
  switch (size) {
    case warpgroup_large:
      return f(ConvWarpgroupTile<warpgroup_large, kSide, 2, 1>());
    case warpgroup:
      return f(ConvWarpgroupTile<warpgroup, kSide, 1, 2>());
    default:
      return f(ConvWarpgroupTile<warpgroup_small, kSide, 1, 3>());
  }
}

constexpr int kConvWarpgroupChunks = kConvWarpgroupChannels / kConvChunk;
// Steps of the weight under way or in use. A step's products run while the next one's begin, so its
// stage is free two steps later.
constexpr int kConvWarpgroupStages = 4;
constexpr int kConvStepsAhead = kConvWarpgroupStages - 2;

template <class T, class Tile>
struct ConvWarpgroupShared {
  // An odd number: the chunks of a pixel lie in different banks.
  static constexpr int kPixels = Tile::kSeen / 2 * 2 + 1;
  alignas(128) T pixels[2][kConvWarpgroupChunks][kPixels][kConvChunk];
  alignas(128) T weight[kConvWarpgroupStages][kConvWarpgroupChunks][Tile::kColumns][kConvChunk];
};

// What a block sees of an image: from its first pixel on, perhaps outside.
template <class T>
struct ConvView {
  const T* image;
  int top, left;
};

// Starts copying a part of what a block sees, channels [channel, channel + 64).
template <int kParts, class T, class Tile, int kPixels>
__device__ __forceinline__ void conv_copy_seen(
    T (&shared)[kConvWarpgroupChunks][kPixels][kConvChunk], const Conv3x3Plan& plan,
    const ConvView<T>& view, int channel, int part, Tile) {
  constexpr int kAtOnce = Tile::kThreads / kConvWarpgroupChunks;
  constexpr int kCopies = static_cast<int>(divide_up(divide_up(Tile::kSeen, kAtOnce), kParts));
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % kConvWarpgroupChunks;
  const int first_channel = channel + chunk * kConvChunk;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int pixel = (part * kCopies + i) * kAtOnce + thread / kConvWarpgroupChunks;
    if (pixel >= Tile::kSeen) continue;
    const int y = view.top + pixel / Tile::kSeenWidth, x = view.left + pixel % Tile::kSeenWidth;
    const bool valid =
        y >= 0 && y < plan.height && x >= 0 && x < plan.width && first_channel < plan.in_channels;
    const int64_t offset = (int64_t{y} * plan.width + x) * plan.in_channels + first_channel;
    ptx::cp_async<16>(&shared[chunk][pixel], view.image + (valid ? offset : 0), valid);
  }
}

// `step` is where this thread's first chunk of a step of the weight lies: conv_first_weight.
template <int kThreads, class T, int kColumns>
__device__ __forceinline__ void conv_copy_weight_step(
    T (&shared)[kConvWarpgroupChunks][kColumns][kConvChunk], const T* step) {
  static_assert(kThreads % kColumns == 0);  // a thread copies of one column
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int chunk = 0; chunk < kConvWarpgroupChunks; chunk += kThreads / kColumns) {
    ptx::cp_async<16>(&shared[chunk + thread / kColumns][thread % kColumns],
                      step + chunk * (kConvPackedColumns * kConvChunk));
  }
}
template <class Tile>
__device__ __forceinline__ int64_t conv_first_weight(const Conv3x3Plan& plan, int phase,
                                                     int column_tile) {
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = thread / Tile::kColumns, column = thread % Tile::kColumns;
  return plan.tile_place(phase, column_tile) + column / kConvPackedColumns * plan.group_elements() +
         (chunk * kConvPackedColumns + column % kConvPackedColumns) * kConvChunk;
}

// Threads of a block; without products of warpgroups a kernel is empty and takes but one warp,
// which tells the launcher.
template <class Tile>
__host__ __device__ constexpr int conv_warpgroup_threads() {
  return ptx::has_warpgroup_products() ? Tile::kThreads : 32;
}

template <class T, class Tile>
__global__ void __launch_bounds__(conv_warpgroup_threads<Tile>(), Tile::kBlocks)
    conv3x3_warpgroup_kernel(Conv3x3CudaParams<T> params) {
  if (!ptx::has_warpgroup_products()) return;
  using Shared = ConvWarpgroupShared<T, Tile>;
  constexpr int kColumnFragments = Tile::kColumns / 8;
  auto& shared = *dynamic_shared<Shared>();
  const Conv3x3Plan& plan = params.plan;
  const auto [phase, row_parity, column_parity, column_tile, tile] = conv_block(plan);
  const unsigned tiles_across = (plan.grid_width + Tile::kWidth - 1) / Tile::kWidth;
  const unsigned tiles_down = (plan.grid_height + Tile::kHeight - 1) / Tile::kHeight;
  const int left = static_cast<int>(tile % tiles_across) * Tile::kWidth;
  const int top = static_cast<int>(tile / tiles_across % tiles_down) * Tile::kHeight;
  const int64_t image = tile / tiles_across / tiles_down;

  const ConvView<T> view{params.x + image * plan.height * plan.width * plan.in_channels,
                         top - plan.padding + row_parity, left - plan.padding + column_parity};
  const T* weight = params.weight + conv_first_weight<Tile>(plan, phase, column_tile);
  const auto copy_weight = [&](int step) {
    if (step < plan.depth_steps) {
      conv_copy_weight_step<Tile::kThreads>(shared.weight[step % kConvWarpgroupStages], weight);
    }
    weight += kConvWarpgroupChannels * kConvPackedColumns;
  };
  ptx::griddepcontrol_wait();  // for the packed weight
  conv_copy_seen<1>(shared.pixels[0], plan, view, 0, 0, Tile());
#pragma unroll
  for (int step = 0; step < kConvStepsAhead; ++step) {
    copy_weight(step);
    ptx::cp_async_commit();
  }

  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = __shfl_sync(0xffffffffu, thread / 128, 0);  // known to be the warp's
  const auto square_row = [&](int m) { return (warpgroup * Tile::kSquares + m) / 2 * 8; };
  const auto square_column = [&](int m) { return (warpgroup * Tile::kSquares + m) % 2 * 8; };
  float sums[Tile::kSquares][kColumnFragments][4] = {};
#pragma unroll
  for (int m = 0; m < Tile::kSquares; ++m) ptx::hold_registers(sums[m]);
  int step = 0;
  for (int channel = 0, half = 0; channel < plan.in_channels;
       channel += kConvWarpgroupChannels, half ^= 1) {
#pragma unroll 1
    for (int tap = 0; tap < Tile::kTaps; ++tap, ++step) {
      ptx::cp_async_wait<kConvStepsAhead - 1>();
      ptx::fence_for_warpgroup();
      __syncthreads();  // and everybody is done with all steps but the one before

      const int tap_place = tap / Tile::kSide * Tile::kSeenWidth + tap % Tile::kSide;
      const auto& step_weight = shared.weight[step % kConvWarpgroupStages];
      ptx::warpgroup_begin();
#pragma unroll
      for (int chunk = 0; chunk < kConvWarpgroupChunks; chunk += 2) {
        const ptx::ChunkedMatrix<T> right{step_weight[chunk][0], Tile::kColumns * kConvChunk,
                                          8 * kConvChunk};
#pragma unroll
        for (int m = 0; m < Tile::kSquares; ++m) {
          const int place = square_row(m) * Tile::kSeenWidth + square_column(m) + tap_place;
          const ptx::ChunkedMatrix<T> pixels{shared.pixels[half][chunk][place],
                                             Shared::kPixels * kConvChunk,
                                             Tile::kSeenWidth * kConvChunk};
          ptx::warpgroup_multiply(sums[m], pixels, right);
        }
      }
      ptx::warpgroup_commit();

      copy_weight(step + kConvStepsAhead);
      // The next channels, into what was read until two steps ago, while they are not yet needed.
      if (tap > 0 && tap <= Tile::kTaps - kConvStepsAhead &&
          channel + kConvWarpgroupChannels < plan.in_channels) {
        conv_copy_seen<Tile::kTaps - kConvStepsAhead>(
            shared.pixels[half ^ 1], plan, view, channel + kConvWarpgroupChannels, tap - 1, Tile());
      }
      ptx::cp_async_commit();
      ptx::warpgroup_wait<1>();
    }
  }
  ptx::warpgroup_wait<0>();

  const int lane = thread % 32, warp = thread / 32 % 4;
  const int first_column = column_tile * Tile::kColumns + lane % 4 * kConvChunk;
#pragma unroll
  for (int m = 0; m < Tile::kSquares; ++m) {
    ptx::hold_registers(sums[m]);
    const int x = left + square_column(m) + lane / 4;
    const int first_y = top + square_row(m) + warp * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int y = first_y + half;
      const bool inside = x < plan.grid_width && y < plan.grid_height;
      const int64_t row = (image * plan.grid_height + y) * plan.parities + row_parity;
      const int64_t offset =
          ((row * plan.grid_width + x) * plan.parities + column_parity) * plan.out_channels;
      // All of the residual is on its way before any of it is waited for.
      ConvChunk<T> residual[kColumnFragments / 4];
#pragma unroll
      for (int n = 0; n < kColumnFragments / 4; ++n) {
        if (inside) residual[n] = conv_load_residual(params, offset, first_column + n * 32);
      }
#pragma unroll
      for (int n = 0; n < kColumnFragments / 4; ++n) {
        float values[kConvChunk];
#pragma unroll
        for (int i = 0; i < kConvChunk; ++i) values[i] = sums[m][n * 4 + i / 2][2 * half + i % 2];
        conv_gather_columns(values);
        if (inside) conv_store(params, values, residual[n], offset, first_column + n * 32);
      }
    }
  }
}

}  // namespace flexvar
