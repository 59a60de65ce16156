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
constexpr int64_t kConvDepth = 96;  // entries of the depth that meet all pixels in one go
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

// What a call needs besides, in floats: the map, a panel of the weight, its taps on their way there
// and the sums; a vector may be stored to or loaded from beyond the last of each.
static inline int64_t conv3x3_map_size(const Conv3x3Params& params, const Conv3x3Product& product) {
  return product.map_rows * product.map_columns * params.in_channels + kConvLanes;
}
static inline int64_t conv3x3_panel_size(const Conv3x3Product& product) {
  return product.phases * product.side * kConvDepth * kConvColumns;
}
static inline int64_t conv3x3_taps_size(const Conv3x3Product& product) {
  return 9 * (kConvDepth / product.side * 2) * kConvLanes;
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

// With `is_packed` the scratch memory holds the map from the call before.
FLEXVAR_DECLARE_CPU_KERNEL(conv3x3_block, (const Conv3x3Params& params, const Conv3x3Block& block,
                                           bool is_packed, float* scratch));

}  // namespace flexvar
