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

enum class ConvTileSize : int { large, small, narrow };
struct ConvTileShape {
  int rows, columns;
};
constexpr ConvTileShape conv_tile_shape(ConvTileSize size) {
  return size == ConvTileSize::large   ? ConvTileShape{128, 128}
         : size == ConvTileSize::small ? ConvTileShape{64, 64}
                                       : ConvTileShape{128, 32};
}

struct Conv3x3Plan {
  int64_t batch;
  int height, width, in_channels, out_channels;
  int grid_height, grid_width;  // of a phase
  int side, stride, padding;    // taps a side; of the grid in x
  int parities;                 // of rows, and of columns
  int padded_channels;          // in_channels to a multiple of 8, the elements of 16 bytes
  int depth_steps;              // of kConvDepth
  ConvTileSize tile;
  int tile_columns, column_tiles;
  int64_t row_tiles;

  int phases() const { return parities * parities; }
  int64_t blocks() const { return row_tiles * column_tiles * phases(); }
  int64_t padded_columns() const { return int64_t{column_tiles} * tile_columns; }
  // Of the packed weight: [phases][column_tiles][depth_steps][columns of a tile][kConvDepth].
  int64_t weight_elements() const { return phases() * padded_columns() * depth_steps * kConvDepth; }
};

// Sums are taken in the same order in every tile: which one is chosen changes no bit.
inline Conv3x3Plan plan_conv3x3(int64_t batch, int64_t in_channels, int64_t height, int64_t width,
                                int64_t out_channels, ConvResize resize, int multiprocessors) {
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
  plan.padded_channels = static_cast<int>(divide_up(in_channels, 8) * 8);
  plan.depth_steps = static_cast<int>(
      divide_up(int64_t{plan.side} * plan.side * plan.padded_channels, kConvDepth));
  const int64_t rows = batch * plan.grid_height * plan.grid_width;
  const auto choose = [&](ConvTileSize size) {
    const ConvTileShape shape = conv_tile_shape(size);
    plan.tile = size;
    plan.tile_columns = shape.columns;
    plan.column_tiles = static_cast<int>(divide_up(out_channels, shape.columns));
    plan.row_tiles = divide_up(rows, shape.rows);
  };
  choose(out_channels <= 32 ? ConvTileSize::narrow : ConvTileSize::large);
  const bool is_half_empty = plan.tile == ConvTileSize::large && out_channels <= 64;
  if (is_half_empty || (plan.tile == ConvTileSize::large && plan.blocks() < multiprocessors)) {
    choose(ConvTileSize::small);
  }
  return plan;
}

}  // namespace flexvar
