#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"

namespace flexvar {

enum class LinearElement : int { float32, float16, bfloat16 };

// out = residual + gate * activation(x weight^T + bias); all contiguous.
struct LinearParams {
  const void* x;         // [rows, depth]
  const void* weight;    // [columns, depth]
  const float* bias;     // [columns], or null
  const float* gate;     // [rows / rows_per_gate, columns], or null
  const void* residual;  // [rows, columns] of the element of out, or null
  void* out;             // [rows, columns]
  LinearElement x_element, weight_element, out_element;
  int64_t rows, columns, depth, rows_per_gate;
  bool gelu;
};

// What one call computes: a block of the output, at most kLinearRows x kLinearColumns large.
struct LinearBlock {
  int64_t row_begin, row_end, column_begin, column_end;
};
constexpr int64_t kLinearRows = 264;
constexpr int64_t kLinearColumns = 256;
// Columns of a block begin at multiples of this.
constexpr int64_t kLinearColumnStep = 64;

// What a call needs besides: sums [kLinearRows, kLinearColumns], and for each pass over a part of
// the depth the rows of x, and a panel of kLinearColumnStep columns of the weight.
constexpr int64_t kLinearPass = 256;                     // 32-bit entries of the depth
constexpr int64_t kLinearPassStride = kLinearPass + 16;  // not a power of two: few cache sets
constexpr int64_t kLinearScratchBytes =
    4 * (kLinearRows * (kLinearColumns + kLinearPassStride) + kLinearPass * kLinearColumnStep);

FLEXVAR_DECLARE_CPU_KERNEL(linear_block,
                           (const LinearParams& params, const LinearBlock& block, void* scratch));

}  // namespace flexvar
