// The order of 16-byte chunks in tiles of shared memory, as matrix products take them.
#pragma once

#include "common/host_device.h"

namespace flexvar::ptx {

// Where column `column` of row `row` is in a tile whose rows are 64 16-bit elements: chunks of 16
// bytes change places within a row, so that 8 of them below each other lie in different banks. It
// is the 128-byte swizzle of Hopper's matrix products, for which a tile begins at a multiple of
// 1024 bytes.
FLEXVAR_HOST_DEVICE constexpr int swizzled_column(int row, int column) {
  return column ^ (row & 7) * 8;
}

// A matrix in shared memory without a swizzle, for products of a warpgroup over a depth of 16: rows
// are two chunks of 8 elements (16 bytes), and the same chunk of 8 rows is contiguous. Strides in
// elements. It may begin at any 16 bytes.
template <class T>
struct ChunkedMatrix {
  const T* data;
  int chunk_stride, group_stride;  // to the other chunk; to the next 8 rows
};

}  // namespace flexvar::ptx
