#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "common/float_element.h"

namespace flexvar {

// A row of each image's own vector is `image * stride` behind the first; stride 0: one for all.
struct NormVectors {
  const float* data;
  int64_t stride;
};

// y = x + gate * branch (without a branch y = x, not written); out = LN(y) * scale + shift.
struct LayerNormModulateParams {
  const void* x;       // [rows, columns]
  const void* branch;  // [rows, columns], or null
  NormVectors gate, scale, shift;
  void* y;    // [rows, columns] of x_element, if there is a branch
  void* out;  // [rows, columns]
  FloatElement x_element, branch_element, out_element;
  int64_t columns, rows_per_image;
  float eps;
};

struct LayerNormModulateBackwardParams {
  const void* grad_out;  // [rows, columns]
  const void* x;         // [rows, columns]: what was normalised, y where there is a branch
  NormVectors scale;
  void* grad_x;  // [rows, columns] of x_element
  // If there is a branch, y = x + gate * branch:
  const void* grad_y;  // [rows, columns]
  const void* branch;  // [rows, columns], or null
  NormVectors gate;
  void* grad_branch;  // [rows, columns] of branch_element
  FloatElement grad_element, x_element, grad_y_element, branch_element;
  int64_t columns, rows_per_image;
  float eps;
};

// Floats of scratch that a call of either kernel needs for a row.
constexpr int64_t norm_scratch(int64_t columns) { return (columns + 63) / 64 * 64; }

FLEXVAR_DECLARE_CPU_KERNEL(layer_norm_modulate_rows, (const LayerNormModulateParams& params,
                                                      float* scratch, int64_t begin, int64_t end));
// Also writes the sums over the rows [begin, end) of grad_out * LN(x), of grad_out and, if there is
// a branch, of grad_x * branch: sums, rows of norm_scratch(columns). `scratch` holds two such rows.
FLEXVAR_DECLARE_CPU_KERNEL(layer_norm_modulate_backward_rows,
                           (const LayerNormModulateBackwardParams& params, float* scratch,
                            float* sums, int64_t begin, int64_t end));

}  // namespace flexvar
