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

// Rows of x are packed together, at most so many, and their sums stay in the L2 cache.
constexpr int64_t kLinearRows = 528;
// Columns of a block begin at multiples of this: the most that a panel of the weight has.
constexpr int64_t kLinearColumns = 64;
// Of the depth, in 32-bit entries: what a sum adds up before the next such chain begins, and what a
// panel holds, which then stays in the L1 cache.
constexpr int64_t kLinearChain = 128;

// Rows that are packed together (Lines in common/cpu_gemm.h); blocks begin at multiples of it.
constexpr int64_t kLinearGroup = 6;

// What one call computes: a block of the output. Rows count from the first that is packed.
struct LinearBlock {
  int64_t row_begin, row_end, column_begin, column_end;
};
// Packed rows: entries [chains of the depth][groups][kLinearChain, as Lines of kLinearGroup rows].
struct LinearRows {
  int64_t first, count;  // of params.rows
  float* entries;

  // Of one chain.
  int64_t entries_in_chain() const {
    return (count + kLinearGroup - 1) / kLinearGroup * kLinearGroup * kLinearChain;
  }
  // Of all: enough for any number of elements in one.
  static int64_t packed_size(int64_t rows, int64_t depth) {
    const int64_t chains = (depth + kLinearChain - 1) / kLinearChain;
    return chains * LinearRows{0, rows, nullptr}.entries_in_chain();
  }
};

// What linear_block needs besides, in floats: sums [kLinearRows, kLinearColumns] and a panel.
constexpr int64_t kLinearScratchSize = (kLinearRows + kLinearChain) * kLinearColumns;

// Packs rows [begin, end) of those.
FLEXVAR_DECLARE_CPU_KERNEL(linear_pack, (const LinearParams& params, const LinearRows& rows,
                                         int64_t begin, int64_t end));
FLEXVAR_DECLARE_CPU_KERNEL(linear_block, (const LinearParams& params, const LinearRows& rows,
                                          const LinearBlock& block, float* scratch));

}  // namespace flexvar
