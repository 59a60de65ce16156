// 3x3 convolutions as products of matrices (common/cpu_gemm.h).
//
// Pixels are the rows of the left factor. What a block sees of x is packed with the zeros around
// it, so that the taps of a row, which stand side by side, are one run of the depth. With few
// output channels, columns of the product are the taps of every one of them instead, which are
// added up afterwards: 9 taps of 3 channels fill two vectors instead of a fifth of nine.
#pragma once

#include "common/cpu_isa.h"
#include "conv3x3/cpu_params.h"

namespace flexvar {

// What one call computes: `rows` x `columns` pixels of the grid, in all phases, for at most
// kConvColumns output channels from `channel` on.
struct Conv3x3Block {
  int64_t image, row, column, rows, columns, channel;
};
constexpr int64_t kConvColumns = 64;
constexpr int64_t kConvLanes = 16;  // of a vector, at most

// A block as a product: of phases with a square of taps, over pixels of the map that it sees.
struct Conv3x3Product {
  int64_t phases, side, stride, rows, columns;
  int64_t map_rows, map_columns;
};
static inline bool has_taps_as_columns(const Conv3x3Params& params) {
  return params.resize == ConvResize::none && 9 * params.out_channels <= kConvColumns;
}
static inline Conv3x3Product conv3x3_product(const Conv3x3Params& params, int64_t rows,
                                             int64_t columns) {
  const int64_t map_rows = (rows - 1) * params.stride + 3;
  const int64_t map_columns = (columns - 1) * params.stride + 3;
  if (has_taps_as_columns(params)) return {1, 1, 1, map_rows, map_columns, map_rows, map_columns};
  return {params.phases, params.side, params.stride, rows, columns, map_rows, map_columns};
}

// Entries of a pixel that meet their weights in one go: few enough for those to come from the L2
// cache, for as long a chain of sums as that allows.
static inline int64_t conv3x3_entries(const Conv3x3Product& product) {
  return product.side == 3 ? 32 : product.side == 2 ? 64 : 128;
}
// Input channels of them at most.
static inline int64_t conv3x3_pack_step(const Conv3x3Product& product) {
  return 2 * conv3x3_entries(product);
}

// Where the weight is packed beforehand: [steps of kConvColumns][in_channels] of this many floats,
// what a product takes at a time standing where the first of its channels would.
static inline int64_t conv3x3_channel_panel_size(const Conv3x3Product& product) {
  return product.phases * product.side * product.side * kConvColumns;
}

// What a call needs besides, in floats: the map, a panel of the weight, its taps on their way there
// and the sums; a vector may be stored to or loaded from beyond the last of each.
static inline int64_t conv3x3_map_size(const Conv3x3Params& params, const Conv3x3Product& product) {
  return product.map_rows * product.map_columns * params.in_channels + kConvLanes;
}
static inline int64_t conv3x3_panel_size(const Conv3x3Product& product) {
  return conv3x3_entries(product) * conv3x3_channel_panel_size(product);
}
static inline int64_t conv3x3_taps_size(const Conv3x3Product& product) {
  return 9 * conv3x3_pack_step(product) * kConvLanes;
}
static inline int64_t conv3x3_sums_size(const Conv3x3Product& product) {
  return product.phases * product.rows * product.columns * kConvColumns + kConvLanes;
}

static inline int64_t conv3x3_scratch_size(const Conv3x3Params& params, int64_t rows,
                                           int64_t columns) {
  const Conv3x3Product product = conv3x3_product(params, rows, columns);
  return conv3x3_map_size(params, product) + conv3x3_panel_size(product) +
         conv3x3_taps_size(product) + conv3x3_sums_size(product);
}

// Packs channels [begin, end) for the output channels from `channel` on; `begin` is a multiple of
// conv3x3_pack_step.
FLEXVAR_DECLARE_CPU_KERNEL(conv3x3_pack, (const Conv3x3Params& params, int64_t channel,
                                          int64_t begin, int64_t end, float* panels, float* taps));
// `panels` of the whole weight, or null: the block packs its own. With `is_packed` the scratch
// memory holds the map from the call before.
FLEXVAR_DECLARE_CPU_KERNEL(conv3x3_block, (const Conv3x3Params& params, const Conv3x3Block& block,
                                           const float* panels, bool is_packed, float* scratch));

// Winograd's way (cpu_winograd.h), for maps that keep their size. What one call computes: at most
// kWinogradTiles tiles of outputs x outputs pixels, for at most kConvColumns output channels from
// `channel` on.
struct WinogradBlock {
  int64_t image, tile_row, tile_column, tiles, tile_columns, channel;  // tile_columns in a row
};
constexpr int64_t kWinogradTiles = 64;
// Input channels that are transformed together.
constexpr int64_t kWinogradChannels = 128;

// What belongs to each of the products starts a little off a multiple of 4 KiB: at one, all of them
// would take the same few lines of the L1 cache.
constexpr int64_t kWinogradMapStride = kWinogradTiles * kWinogradChannels + kConvLanes;
constexpr int64_t kWinogradSumsStride = kWinogradTiles * kConvColumns + kConvLanes;
constexpr int64_t kWinogradPanelStride = kWinogradChannels * kConvColumns + kConvLanes;

struct Winograd {
  int64_t outputs;  // of a tile in a row
  int64_t chain;    // input channels that a sum adds up before the next such chain begins

  constexpr int64_t side() const { return outputs + 2; }  // of what a tile sees
  constexpr int64_t products() const { return side() * side(); }
  // Where the weight is transformed beforehand: panels [steps of kConvColumns][steps of channels].
  static int64_t channel_steps(int64_t in_channels) {
    return (in_channels + kWinogradChannels - 1) / kWinogradChannels;
  }
  constexpr int64_t panel_size() const { return products() * kWinogradPanelStride; }

  // What a call needs besides, in floats: the transformed map, sums, a panel and its taps, and what
  // redoes a tile.
  int64_t map_size(int64_t in_channels) const {
    return channel_steps(in_channels) * products() * kWinogradMapStride;
  }
  constexpr int64_t sums_size() const { return products() * kWinogradSumsStride; }
  static constexpr int64_t taps_size() { return 9 * kWinogradChannels * kConvLanes; }
  int64_t scratch_size(const Conv3x3Params& params) const {
    return map_size(params.in_channels) + sums_size() + panel_size() + taps_size() +
           conv3x3_scratch_size(params, outputs, outputs);
  }
};
// In float32 a quarter of an output's products, all in one chain, would err 1.6 times as much as
// torch's convolution, and larger tiles ten times; rounded to bfloat16, neither shows.
constexpr Winograd kWinogradFloat32{2, 64}, kWinogradBfloat16{4, kWinogradChannels};
static inline const Winograd& winograd_of(const Conv3x3Params& params) {
  return params.element == FloatElement::float32 ? kWinogradFloat32 : kWinogradBfloat16;
}

// Transforms channels [begin, end), a step of them, for the output channels from `channel` on.
FLEXVAR_DECLARE_CPU_KERNEL(winograd_pack, (const Conv3x3Params& params, int64_t channel,
                                           int64_t begin, int64_t end, float* panels, float* taps));
FLEXVAR_DECLARE_CPU_KERNEL(winograd_block, (const Conv3x3Params& params, const WinogradBlock& block,
                                            const float* panels, bool is_packed, float* scratch));

}  // namespace flexvar
