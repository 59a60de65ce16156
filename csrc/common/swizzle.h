// The order of 16-byte chunks in tiles of shared memory.
#pragma once

#include "common/host_device.h"

namespace flexvar::ptx {

// Where column `column` of row `row` is in a tile whose rows are 64 16-bit elements: chunks of 16
// bytes change places within a row, so that 8 of them below each other lie in different banks. It
// is the 128-byte swizzle of Hopper's matrix products, for which a tile begins at a multiple of
// 1024 bytes.
FLEXVAR_HOST_DEVICE constexpr int swizzled_column(int row, int column) {
  return column ^ row % 8 * 8;
}

}  // namespace flexvar::ptx
