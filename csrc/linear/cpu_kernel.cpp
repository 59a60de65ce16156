#include "linear/cpu_kernel.h"

#include "linear/cpu_epilogue.h"
#include "linear/cpu_panel.h"

namespace flexvar::FLEXVAR_ISA {

static_assert(kLinearGroup == kRegisterRows);

static void finish_group(const LinearParams& params, int64_t row, int64_t rows, int64_t column,
                         int64_t columns, const float* sums) {
  switch (params.out_element) {
    case FloatElement::float32:
      return finish<float>(params, row, rows, column, columns, sums, kPanelColumns);
    case FloatElement::float16:
      return finish<Half>(params, row, rows, column, columns, sums, kPanelColumns);
    case FloatElement::bfloat16:
      return finish<Bfloat16>(params, row, rows, column, columns, sums, kPanelColumns);
  }
}

// What finish_group will write.
static void prefetch_group(const LinearParams& params, int64_t row, int64_t rows, int64_t column,
                           int64_t columns) {
  const int64_t bytes = params.out_element == FloatElement::float32 ? 4 : 2;
  char* place = static_cast<char*>(params.out) + (row * params.columns + column) * bytes;
  for (int64_t i = 0; i < rows; ++i, place += params.columns * bytes) {
    for (int64_t j = 0; j < columns * bytes; j += 64) __builtin_prefetch(place + j, 1);
  }
}

// A group's elements, `count` of each row, to rows of entries.
template <typename Entry, typename X>
static void convert_group(const X* x, int64_t stride, int64_t rows, int64_t count, Entry* entries) {
  constexpr int64_t of_entry = kElementsPerEntry<Entry>;
  for (int64_t i = 0; i < rows; ++i, x += stride, entries += kLinearPanelDepth) {
    for (int64_t k = 0; k < count; k += kFloatLanes * of_entry) {
      store(reinterpret_cast<float*>(entries + k / of_entry),
            load_entries<Entry>(x + k, count - k));
    }
  }
}

// All rows of a block meet a panel of the weight, which stays in the L2 cache, a few at a time,
// which stay in the L1 cache with their sums. Every sum has one order, given by the depth alone.
template <typename X, typename W>
static void multiply_block(const LinearParams& params, const LinearBlock& block, float* sums) {
  using Entry = typename EntryOf<X>::Type;
  constexpr int64_t of_entry = kElementsPerEntry<Entry>;
  float* const panel = sums + kLinearRows * kLinearColumns;
  Entry* const converted = reinterpret_cast<Entry*>(panel + kLinearPanelDepth * kLinearColumns);
  const int64_t depth = params.depth, rows = block.row_end - block.row_begin;
  const X* const x = static_cast<const X*>(params.x) + block.row_begin * depth;
  const W* const weights = static_cast<const W*>(params.weight);
  // Elements that are entries as they lie need no copy.
  const bool direct = sizeof(X) * of_entry == 4 && depth % of_entry == 0;

  for (int64_t column = block.column_begin; column < block.column_end; column += kPanelColumns) {
    const int64_t left = block.column_end - column;
    const int64_t columns = left < kPanelColumns ? left : kPanelColumns;
    const int64_t vectors = (columns + kFloatLanes - 1) / kFloatLanes;
    for (int64_t begin = 0; begin < depth; begin += kLinearPanelDepth * of_entry) {
      const int64_t rest = depth - begin;
      const int64_t count =
          rest < kLinearPanelDepth * of_entry ? rest : kLinearPanelDepth * of_entry;
      const int64_t entries = (count + of_entry - 1) / of_entry;
      pack_panel<Entry>(panel, weights + column * depth + begin, depth, columns, count,
                        kPanelColumns * depth);
      for (int64_t i = 0; i < rows; i += kLinearGroup) {
        const int64_t group = rows - i < kLinearGroup ? rows - i : kLinearGroup;
        const X* const x_group = x + i * depth + begin;
        Matrix<const Entry> left_factor{reinterpret_cast<const Entry*>(x_group), depth / of_entry};
        if (!direct) {
          convert_group(x_group, depth, group, count, converted);
          left_factor = {converted, kLinearPanelDepth};
        }
        float* const group_sums = sums + i * kPanelColumns;
        if (count == rest) prefetch_group(params, block.row_begin + i, group, column, columns);
        for (int64_t k = 0; k < entries; k += kLinearChain) {
          const int64_t chain = entries - k < kLinearChain ? entries - k : kLinearChain;
          multiply<float, Entry>({left_factor.data + k, left_factor.row},
                                 {panel + k * kPanelColumns, kPanelColumns},
                                 {group_sums, kPanelColumns}, group, vectors, chain, begin + k > 0);
        }
        if (count == rest) {
          finish_group(params, block.row_begin + i, group, column, columns, group_sums);
        }
      }
    }
  }
}

void linear_block(const LinearParams& params, const LinearBlock& block, void* scratch) {
  float* const sums = static_cast<float*>(scratch);
  const bool float_weight = params.weight_element == FloatElement::float32;
  switch (params.x_element) {
    case FloatElement::float32:
      multiply_block<float, float>(params, block, sums);
      break;
    case FloatElement::float16:
      float_weight ? multiply_block<Half, float>(params, block, sums)
                   : multiply_block<Half, Half>(params, block, sums);
      break;
    case FloatElement::bfloat16:
      float_weight ? multiply_block<Bfloat16, float>(params, block, sums)
                   : multiply_block<Bfloat16, Bfloat16>(params, block, sums);
      break;
  }
}

}  // namespace flexvar::FLEXVAR_ISA
