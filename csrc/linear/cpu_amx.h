// The linear layer on the tile unit (common/cpu_amx.h).
//
// The weight is the left factor: its rows become tiles as they are, and only x is transposed, once
// for all blocks. All sums are those of the transposed output.
#pragma once

#include "linear/cpu_kernel.h"

namespace flexvar::amx {

constexpr int64_t kLinearAmxMaxRows = 512;  // of x, packed together
constexpr int64_t kLinearAmxColumns = 256;  // of the output, summed together

struct LinearAmxRows {
  int64_t begin, end;  // at most kLinearAmxMaxRows
};
struct LinearAmxBlock {
  LinearAmxRows rows;
  int64_t column_begin, column_end;  // at most kLinearAmxColumns, a multiple of 32 apart
};
// Of linear_amx_block, aligned to 64 bytes: panels of the weight; sums.
constexpr int64_t kLinearAmxPanelBytes = 48 * 1024;
constexpr int64_t kLinearAmxScratchBytes =
    kLinearAmxPanelBytes + 4 * kLinearAmxMaxRows * kLinearAmxColumns;

// What 16 rows of x take, packed.
int64_t linear_amx_panel_bytes(const LinearParams& params);
// Packs rows.begin + 16 * tile_begin and on, to rows.begin + 16 * tile_end or rows.end. Panels are
// [parts of the depth][tiles of rows].
void linear_amx_pack(const LinearParams& params, const LinearAmxRows& rows, int64_t tile_begin,
                     int64_t tile_end, char* panels);
void linear_amx_block(const LinearParams& params, const LinearAmxBlock& block, const char* x_panels,
                      char* scratch);

}  // namespace flexvar::amx
