// 3x3 convolutions on the tile unit (common/cpu_amx.h).
//
// Pixels are the rows of the left factor: 16 that stand side by side, 32 channels of each, are a
// tile, and the tile of a neighbouring tap begins one pixel further on. The weight is the right
// factor, packed for each block of 32 input channels with all taps behind each other.
#pragma once

#include "conv3x3/cpu_params.h"

namespace flexvar::amx {

struct ConvTileParams : Conv3x3Params {
  char* weight_panels;  // packed: [phases][column_tiles][channel_blocks]

  int64_t taps() const { return side * side; }
  int64_t parts() const { return element == FloatElement::bfloat16 ? 1 : 3; }
  int64_t channel_blocks() const { return (in_channels + 31) / 32; }
  int64_t column_tiles() const { return (out_channels + 15) / 16; }
  int64_t tiles_in_row() const { return (grid_width + 15) / 16; }
  int64_t weight_block_bytes() const { return taps() * parts() * 1024; }
};

// A band of a phase's grid: `rows` rows of `tiles` times 16 pixels, small enough that what it sees
// of x stays in the L2 cache, packed as [channel_blocks][parts][rows][columns] of 32 channels.
struct Conv3x3Band {
  int64_t rows, tiles;

  // At least `count` of them where that takes no thin ones.
  Conv3x3Band(const ConvTileParams& params, int64_t count);
  int64_t seen_rows(const ConvTileParams& params) const { return (rows - 1) * params.stride + 3; }
  int64_t seen_columns(const ConvTileParams& params) const {
    return (tiles * 16 - 1) * params.stride + 3;
  }
  int64_t part_bytes(const ConvTileParams& params) const {
    return seen_rows(params) * seen_columns(params) * 64;
  }
  int64_t bytes(const ConvTileParams& params) const {
    return params.channel_blocks() * params.parts() * part_bytes(params);
  }
};

// What one call of conv3x3_block computes: a band whose first pixel is at (row, 16 * tile), all
// phases, for some of the output channels.
struct ConvTileBlock {
  int64_t image, row, tile, column_tile_begin, column_tile_end;
};
// Tiles of pixels and of columns that are summed together; the sums follow the band in the scratch
// memory.
constexpr int64_t kConvTiles = 16;
constexpr int64_t kConvColumnTiles = 8;
constexpr int64_t kConvSumBytes = kConvTiles * kConvColumnTiles * 1024;

// A unit is a tile of columns of a block of channels: column_tiles * channel_blocks.
void conv3x3_pack_weight(const ConvTileParams& params, int64_t unit_begin, int64_t unit_end);
// With `is_packed` the scratch memory holds the band from the call before.
void conv3x3_block(const ConvTileParams& params, const Conv3x3Band& band,
                   const ConvTileBlock& block, bool is_packed, char* scratch);

}  // namespace flexvar::amx
