#include "linear/cpu_kernel.h"

#include "linear/cpu_dot.h"
#include "linear/cpu_epilogue.h"

namespace flexvar::FLEXVAR_ISA {

template <typename To, typename From>
static void convert(To* to, const From* from, int64_t count) {
  if constexpr (__is_same(To, From)) {
    __builtin_memcpy(to, from, count * sizeof(To));
    return;
  }
  for (int64_t i = 0; i < count; i += kFloatLanes) {
    store_first(to + i, load_first(from + i, count - i), count - i);
  }
}

// The sums of a block: [rows, kLinearColumns]. The depth goes by in passes, so that a tile of the
// weight stays in the L1 cache and the rows of x in the L2 while they meet.
template <typename X, typename W>
static void multiply_block(const LinearParams& params, const LinearBlock& block, float* sums) {
  using E = typename ArithmeticOf<X>::Type;
  constexpr bool convert_weight = !__is_same(W, E);
  constexpr int64_t most = kLinearDepthBytes / sizeof(E);
  const int64_t pass = params.depth <= most ? params.depth : most * 3 / 4;
  E* const x_scratch = reinterpret_cast<E*>(sums + kLinearRows * kLinearColumns);
  E* const weight_scratch = x_scratch + kLinearRows * most;
  const int64_t depth = params.depth, rows = block.row_end - block.row_begin;
  const X* const x_rows = static_cast<const X*>(params.x) + block.row_begin * depth;
  const W* const weights = static_cast<const W*>(params.weight);

  for (int64_t begin = 0; begin < depth; begin += pass) {
    const int64_t count = depth - begin < pass ? depth - begin : pass;
    // Of long rows a part is copied, since parts a power of two apart would share few cache sets.
    const E* x = x_scratch;
    int64_t x_stride = pass;
    if (__is_same(X, E) && depth <= pass) {
      x = reinterpret_cast<const E*>(x_rows);
      x_stride = depth;
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        convert(x_scratch + i * pass, x_rows + i * depth + begin, count);
      }
    }
    for (int64_t column = block.column_begin; column < block.column_end; column += kTileColumns) {
      const E* weight[kTileColumns];
      for (int64_t j = 0; j < kTileColumns; ++j) {
        // Behind the last row of the weight, that row again: sums that nobody reads.
        const int64_t row = column + j < params.columns ? column + j : params.columns - 1;
        const W* source = weights + row * depth + begin;
        if constexpr (convert_weight) {
          convert(weight_scratch + j * most, source, count);
          weight[j] = weight_scratch + j * most;
        } else {
          weight[j] = source;
        }
      }
      float* tile = sums + (column - block.column_begin);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        // While the first rows wait for this tile of the weight, the next one is asked for.
        const int64_t ahead = i == 0 && !convert_weight ? kTileColumns * depth : 0;
        const auto multiply = rows - i == 1   ? multiply_tile<1, E>
                              : rows - i == 2 ? multiply_tile<2, E>
                                              : multiply_tile<kTileRows, E>;
        multiply(x + i * x_stride, x_stride, weight, count, begin > 0, tile + i * kLinearColumns,
                 ahead);
      }
    }
  }
}

void linear_block(const LinearParams& params, const LinearBlock& block, void* scratch) {
  float* const sums = static_cast<float*>(scratch);
  const bool float_weight = params.weight_element == LinearElement::float32;
  switch (params.x_element) {
    case LinearElement::float32:
      multiply_block<float, float>(params, block, sums);
      break;
    case LinearElement::float16:
      float_weight ? multiply_block<Half, float>(params, block, sums)
                   : multiply_block<Half, Half>(params, block, sums);
      break;
    case LinearElement::bfloat16:
      float_weight ? multiply_block<Bfloat16, float>(params, block, sums)
                   : multiply_block<Bfloat16, Bfloat16>(params, block, sums);
      break;
  }
  switch (params.out_element) {
    case LinearElement::float32:
      return finish_block<float>(params, block, sums);
    case LinearElement::float16:
      return finish_block<Half>(params, block, sums);
    case LinearElement::bfloat16:
      return finish_block<Bfloat16>(params, block, sums);
  }
}

}  // namespace flexvar::FLEXVAR_ISA
