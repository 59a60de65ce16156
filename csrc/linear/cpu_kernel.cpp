#include "linear/cpu_kernel.h"

#include "linear/cpu_epilogue.h"
#include "linear/cpu_panel.h"

namespace flexvar::FLEXVAR_ISA {

// The sums of a block: [rows, kLinearColumns]. The depth goes by in passes, so that the rows of x
// and a panel of the weight stay in the L2 cache while they meet. Every sum has one order, given by
// the depth alone.
template <typename X, typename W>
static void multiply_block(const LinearParams& params, const LinearBlock& block, float* sums) {
  using Entry = typename EntryOf<X>::Type;
  constexpr int64_t pass = kLinearPass * kElementsPerEntry<Entry>;
  float* const x_part = sums + kLinearRows * kLinearColumns;
  float* const panel = x_part + kLinearRows * kLinearPassStride;
  const int64_t depth = params.depth, rows = block.row_end - block.row_begin;
  const X* const x = static_cast<const X*>(params.x) + block.row_begin * depth;
  const W* const weights = static_cast<const W*>(params.weight);

  for (int64_t begin = 0; begin < depth; begin += pass) {
    const int64_t count = depth - begin < pass ? depth - begin : pass;
    const int64_t entries = (count + kElementsPerEntry<Entry> - 1) / kElementsPerEntry<Entry>;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < count; k += kFloatLanes * kElementsPerEntry<Entry>) {
        store(x_part + i * kLinearPassStride + k / kElementsPerEntry<Entry>,
              load_entries<Entry>(x + i * depth + begin + k, count - k));
      }
    }
    for (int64_t column = block.column_begin; column < block.column_end; column += kPanelColumns) {
      const int64_t left = params.columns - column;
      const int64_t columns = left < kPanelColumns ? left : kPanelColumns;
      pack_panel<Entry>(panel, weights + column * depth + begin, depth, columns, count,
                        kPanelColumns * depth);
      multiply<float, Entry>({reinterpret_cast<const Entry*>(x_part), kLinearPassStride},
                             {panel, kPanelColumns},
                             {sums + (column - block.column_begin), kLinearColumns}, rows,
                             (columns + kFloatLanes - 1) / kFloatLanes, entries, begin > 0);
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
