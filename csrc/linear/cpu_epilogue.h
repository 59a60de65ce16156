// From the sums of a block to the output: residual + gate * activation(sums + bias).
#pragma once

#include "common/cpu_exp2.h"
#include "common/cpu_vector.h"
#include "linear/cpu_kernel.h"

namespace flexvar::FLEXVAR_ISA {

// x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
static inline Vector<float> gelu_tanh(Vector<float> x) {
  constexpr float minus_2_log2e_sqrt_2_pi = -2.3022081983f;
  Vector<float> exponent = minus_2_log2e_sqrt_2_pi * (x + 0.044715f * (x * x * x));
  const Vector<float> bound = Vector<float>{} + 126.0f;
  exponent = exponent > bound ? bound : exponent;
  exponent = exponent < -bound ? -bound : exponent;
  return x / (1.0f + exp2_within_range(exponent));
}

template <typename Out>
static void finish_block(const LinearParams& params, const LinearBlock& block, const float* sums) {
  const int64_t columns = block.column_end - block.column_begin;
  const float* bias = params.bias ? params.bias + block.column_begin : nullptr;
  for (int64_t row = block.row_begin; row < block.row_end; ++row, sums += kLinearColumns) {
    const int64_t offset = row * params.columns + block.column_begin;
    const float* gate =
        params.gate ? params.gate + row / params.rows_per_gate * params.columns + block.column_begin
                    : nullptr;
    const Out* residual =
        params.residual ? static_cast<const Out*>(params.residual) + offset : nullptr;
    Out* out = static_cast<Out*>(params.out) + offset;
    for (int64_t j = 0; j < columns; j += kFloatLanes) {
      const int64_t count = columns - j;
      Vector<float> y = load(sums + j);
      if (bias) y += load_first(bias + j, count);
      if (params.gelu) y = gelu_tanh(y);
      if (gate) y *= load_first(gate + j, count);
      if (residual) y += load_first(residual + j, count);
      store_first(out + j, y, count);
    }
  }
}

}  // namespace flexvar::FLEXVAR_ISA
