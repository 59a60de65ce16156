// How the CUDA kernels of conv3x3 cut up their work: a product of matrices for each phase. Its rows
// are the pixels of the phase's grid, its columns the output channels, its depth the taps times the
// input channels. Upsampling, a phase is a parity of the output's row and column, with 2 x 2 taps;
// else there is one, with 3 x 3.
#pragma once

#include <cstdint>

#include "common/divide_up.h"
#include "conv3x3/resize.h"

namespace flexvar {

constexpr int kConvDepth = 32;  // of what a block brings at a time
// Columns of the weight that lie together once packed: every tile's are a multiple.
constexpr int kConvPackedColumns = 32;

// Where the device has products of warpgroups, they take tiles of two dimensions (see
// kernel_warpgroup.cuh), which bring kConvWarpgroupChannels of one tap at a time.
constexpr int kConvWarpgroupChannels = 64;
constexpr int kConvLongSum = 32;  // steps, from which on their largest tile is taken

enum class ConvTileSize : int { large, small, narrow, warpgroup_large, warpgroup, warpgroup_small };
struct ConvTileShape {
  int height, width;  // pixels of the grid; height 1: of the grid's rows one behind the other
  int columns;
};
constexpr ConvTileShape conv_tile_shape(ConvTileSize size) {
  switch (size) {
    case ConvTileSize::large:
      return {1, 128, 128};
    case ConvTileSize::small:
      return {1, 64, 64};
    case ConvTileSize::narrow:
      return {1, 128, 32};
    case ConvTileSize::warpgroup_large:
      return {16, 16, 128};
    case ConvTileSize::warpgroup:
      return {8, 16, 128};
    default:
      return {8, 8, 64};
  }
}

struct Conv3x3Plan {
  int64_t batch;
  int height, width, in_channels, out_channels;
  int grid_height, grid_width;  // of a phase
  int side, stride, padding;    // taps a side; of the grid in x
  int parities;                 // of rows, and of columns
  bool by_warpgroups;
  int padded_channels;  // in_channels to a multiple of 8, or of kConvWarpgroupChannels
  int depth_steps;      // of step_depth()
  ConvTileSize tile;
  int tile_columns, column_tiles;
  int64_t row_tiles;

  int phases() const { return parities * parities; }
  int64_t blocks() const { return row_tiles * column_tiles * phases(); }
  // Those of whatever tiles are chosen: the packed weight is the same for all of them.
  __host__ __device__ int padded_columns() const {
    const int fewest = out_channels <= 32 ? 32 : out_channels <= 64 ? 64 : 128;
    return (out_channels + fewest - 1) / fewest * fewest;
  }
  __host__ __device__ int step_depth() const {
    return by_warpgroups ? kConvWarpgroupChannels : kConvDepth;
  }
  // Of the packed weight: [phases][groups of kConvPackedColumns][depth_steps], and for a step
  // [columns of a group][kConvDepth] or, by warpgroups, [chunks of 8 channels][columns of a
  // group][8].
  int64_t weight_elements() const {
    return int64_t{phases()} * padded_columns() * depth_steps * step_depth();
  }
  // From one group to the next.
  __host__ __device__ int64_t group_elements() const {
    return int64_t{kConvPackedColumns} * depth_steps * step_depth();
  }
  // Of the first column of a tile.
  __host__ __device__ int64_t tile_place(int phase, int column_tile) const {
    const int64_t groups = padded_columns() / kConvPackedColumns;
    return (phase * groups + column_tile * (tile_columns / kConvPackedColumns)) * group_elements();
  }
  // The depth goes by taps and their channels; by warpgroups by kConvWarpgroupChannels, their taps
  // and their channels.
  __host__ __device__ int64_t weight_place(int phase, int column, int tap, int channel) const {
    const int64_t groups = padded_columns() / kConvPackedColumns;
    const int64_t group = phase * groups + column / kConvPackedColumns;
    const int group_column = column % kConvPackedColumns;
    if (by_warpgroups) {
      const int step = channel / kConvWarpgroupChannels * side * side + tap;
      const int chunk = channel % kConvWarpgroupChannels / 8;
      return (((group * depth_steps + step) * (kConvWarpgroupChannels / 8) + chunk) *
                  kConvPackedColumns +
              group_column) *
                 8 +
             channel % 8;
    }
    const int depth = tap * padded_channels + channel;
    return ((group * depth_steps + depth / kConvDepth) * kConvPackedColumns + group_column) *
               kConvDepth +
           depth % kConvDepth;
  }
};

// Sums are taken in the same order in every tile of warpgroups and in every other one: a batch
// changes no bit. `has_warpgroups`: the device has their products.
inline Conv3x3Plan plan_conv3x3(int64_t batch, int64_t in_channels, int64_t height, int64_t width,
                                int64_t out_channels, ConvResize resize, int multiprocessors,
                                bool has_warpgroups) {
  const bool up = resize == ConvResize::up, down = resize == ConvResize::down;
  Conv3x3Plan plan{};
  plan.batch = batch;
  plan.height = static_cast<int>(height);
  plan.width = static_cast<int>(width);
  plan.in_channels = static_cast<int>(in_channels);
  plan.out_channels = static_cast<int>(out_channels);
  plan.grid_height = down ? plan.height / 2 : plan.height;
  plan.grid_width = down ? plan.width / 2 : plan.width;
  plan.side = up ? 2 : 3;
  plan.stride = down ? 2 : 1;
  plan.padding = down ? 0 : 1;
  plan.parities = up ? 2 : 1;
  // Fewer channels leave most of their tiles empty; pixels that no product sees twice gain nothing.
  plan.by_warpgroups =
      has_warpgroups && !down && in_channels % 8 == 0 && in_channels >= 32 && out_channels > 32;
  const int padding = plan.by_warpgroups ? kConvWarpgroupChannels : 8;
  plan.padded_channels = static_cast<int>(divide_up(in_channels, padding) * padding);
  plan.depth_steps = static_cast<int>(
      divide_up(int64_t{plan.side} * plan.side * plan.padded_channels, plan.step_depth()));
  const auto choose = [&](ConvTileSize size) {
    const ConvTileShape shape = conv_tile_shape(size);
    plan.tile = size;
    plan.tile_columns = shape.columns;
    plan.column_tiles = static_cast<int>(divide_up(out_channels, shape.columns));
    plan.row_tiles = shape.height == 1
                         ? divide_up(batch * plan.grid_height * plan.grid_width, shape.width)
                         : batch * divide_up(plan.grid_height, shape.height) *
                               divide_up(plan.grid_width, shape.width);
  };
  if (plan.by_warpgroups) {
    // Two blocks of the middle size share a multiprocessor: one multiplies while the other begins
    // or ends. The large one brings less for each product, which takes long sums to tell.
    choose(ConvTileSize::warpgroup_large);
    if (plan.depth_steps < kConvLongSum || plan.blocks() < 2 * int64_t{multiprocessors}) {
      choose(ConvTileSize::warpgroup);
    }
    if (out_channels <= 64 || 4 * plan.blocks() < 3 * int64_t{multiprocessors}) {
      choose(ConvTileSize::warpgroup_small);
    }
    return plan;
  }
  choose(out_channels <= 32 ? ConvTileSize::narrow : ConvTileSize::large);
  const bool is_half_empty = plan.tile == ConvTileSize::large && out_channels <= 64;
  if (is_half_empty || (plan.tile == ConvTileSize::large && plan.blocks() < multiprocessors)) {
    choose(ConvTileSize::small);
  }
  return plan;
}

}  // namespace flexvar
