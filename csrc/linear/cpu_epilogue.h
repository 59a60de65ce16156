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
  const auto is_nothing = exponent > bound;  // 1 + tanh(u) is 0
  exponent = larger(-bound, exponent);
  return is_nothing ? x * 0.0f : x / (1.0f + exp2_within_range(exponent));
}

// Where a row of the output and what belongs to it begin.
template <typename Out>
struct OutputRow {
  const float* gate;
  const Out* residual;
  Out* out;

  OutputRow() = default;
  OutputRow(const LinearParams& params, int64_t row)
      : gate(params.gate ? params.gate + row / params.rows_per_gate * params.columns : nullptr),
        residual(params.residual ? static_cast<const Out*>(params.residual) + row * params.columns
                                 : nullptr),
        out(static_cast<Out*>(params.out) + row * params.columns) {}

  // The first `count` of a vector of sums, of the columns from `column` on.
  inline __attribute__((always_inline)) void finish(Vector<float> y, Vector<float> bias, bool gelu,
                                                    int64_t column, int64_t count) const {
    y += bias;
    if (gelu) y = gelu_tanh(y);
    if (gate) y *= load_first(gate + column, count);
    if (residual) y += load_first(residual + column, count);
#ifdef __AVX512BF16__
    if constexpr (__is_same(Out, Bfloat16)) {
      if (count >= kFloatLanes) {  // denormal numbers become zero, as in the products
        _mm256_storeu_si256((__m256i*)(out + column), (__m256i)_mm512_cvtneps_pbh((__m512)y));
        return;
      }
    }
#endif
    store_first(out + column, y, count);
  }
};

static inline Vector<float> load_bias(const LinearParams& params, int64_t column, int64_t count) {
  // x + -0.0 is x, whatever x is.
  return params.bias ? load_first(params.bias + column, count) : -Vector<float>{};
}

// The output's rows from `row` on, and its columns from `column` on, from sums whose rows are
// `stride` apart.
template <typename Out>
static void finish(const LinearParams& params, int64_t row, int64_t rows, int64_t column,
                   int64_t columns, const float* sums, int64_t stride) {
  for (int64_t i = row; i < row + rows; ++i, sums += stride) {
    const OutputRow<Out> place(params, i);
    for (int64_t j = 0; j < columns; j += kFloatLanes) {
      const int64_t first = column + j, count = columns - j;
      place.finish(load(sums + j), load_bias(params, first, count), params.gelu, first, count);
    }
  }
}

}  // namespace flexvar::FLEXVAR_ISA
