#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "common/float_element.h"

namespace flexvar {

// out = residual + gate * activation(x weight^T + bias); all contiguous.
struct LinearParams {
  const void* x;         // [rows, depth]
  const void* weight;    // [columns, depth]
  const float* bias;     // [columns], or null
  const float* gate;     // [rows / rows_per_gate, columns], or null
  const void* residual;  // [rows, columns] of the element of out, or null
  void* out;             // [rows, columns]
  FloatElement x_element, weight_element, out_element;
  int64_t rows, columns, depth, rows_per_gate;
  bool gelu;
};

// What one call computes: a block of the output, at most kLinearRows rows of it.
struct LinearBlock {
  int64_t row_begin, row_end, column_begin, column_end;
};
constexpr int64_t kLinearRows = 528;
// Columns of a block begin at multiples of this: the most that a panel of the weight has.
constexpr int64_t kLinearColumns = 64;

// Of the depth, in 32-bit entries: what a panel holds, and what a sum adds up before the next such
// chain begins.
constexpr int64_t kLinearPanelDepth = 1024, kLinearChain = 128;
static_assert(kLinearPanelDepth % kLinearChain == 0);
constexpr int64_t kLinearGroup = 6;  // rows that are multiplied together

// What a call needs besides: sums [kLinearRows, kLinearColumns], a panel, and a group's entries.
constexpr int64_t kLinearScratchBytes =
    4 * (kLinearRows * kLinearColumns + kLinearPanelDepth * (kLinearColumns + kLinearGroup));

FLEXVAR_DECLARE_CPU_KERNEL(linear_block,
                           (const LinearParams& params, const LinearBlock& block, void* scratch));

}  // namespace flexvar
