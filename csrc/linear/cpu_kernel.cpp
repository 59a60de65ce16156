#include "linear/cpu_kernel.h"

#include "common/cpu_lines_ahead.h"
#include "linear/cpu_epilogue.h"
#include "linear/cpu_panel.h"

namespace flexvar::FLEXVAR_ISA {

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

template <typename X>
static void pack_rows(const LinearParams& params, const LinearRows& rows, int64_t begin,
                      int64_t end) {
  using Entry = typename EntryOf<X>::Type;
  constexpr int64_t of_entry = kElementsPerEntry<Entry>, elements = kLinearChain * of_entry;
  const X* const x = static_cast<const X*>(params.x) + rows.first * params.depth;
  for (int64_t i = begin; i < end; ++i) {
    float* chain = rows.entries + i * kLinearChain;
    for (int64_t first = 0; first < params.depth; first += elements) {
      const X* const x_chain = x + i * params.depth + first;
      const int64_t left = params.depth - first, count = left < elements ? left : elements;
      for (int64_t k = 0; k < count; k += kFloatLanes * of_entry) {
        store(chain + k / of_entry, load_entries<Entry>(x_chain + k, count - k));
      }
      chain += rows.count * kLinearChain;
    }
  }
}

// All rows meet a panel of the weight, which stays in the L1 cache, a few at a time. Every sum has
// one order, given by the depth alone.
template <typename X, typename W>
static void multiply_block(const LinearParams& params, const LinearRows& rows,
                           const LinearBlock& block, float* sums) {
  using Entry = typename EntryOf<X>::Type;
  constexpr int64_t of_entry = kElementsPerEntry<Entry>, elements = kLinearChain * of_entry;
  float* const panel = sums + kLinearRows * kLinearColumns;
  const int64_t depth = params.depth;
  const W* const weights = static_cast<const W*>(params.weight);

  for (int64_t column = block.column_begin; column < block.column_end; column += kPanelColumns) {
    const int64_t columns_left = block.column_end - column;
    const int64_t columns = columns_left < kPanelColumns ? columns_left : kPanelColumns;
    const int64_t vectors = (columns + kFloatLanes - 1) / kFloatLanes;
    const float* chains = rows.entries;
    for (int64_t first = 0; first < depth; first += elements) {
      const int64_t left = depth - first, count = left < elements ? left : elements;
      const int64_t entries = (count + of_entry - 1) / of_entry;
      const bool is_last = count == left;
      pack_panel<Entry>(panel, weights + column * depth + first, depth, columns, count);
      const int64_t next_column = is_last ? column + kPanelColumns : column;
      const int64_t next_columns = params.columns - next_column;
      const int64_t steps =
          (block.row_end - block.row_begin + kRegisterRows - 1) / kRegisterRows * entries;
      const int64_t next_first = is_last ? 0 : first + elements;
      LinesAhead ahead(weights + next_column * depth + next_first,
                       next_columns < kPanelColumns ? next_columns : kPanelColumns,
                       (depth - next_first < elements ? depth - next_first : elements) * sizeof(W),
                       depth * sizeof(W), steps);
      for (int64_t row = block.row_begin; row < block.row_end; row += kRegisterRows) {
        const int64_t rows_left = block.row_end - row;
        const int64_t group = rows_left < kRegisterRows ? rows_left : kRegisterRows;
        float* const group_sums = sums + (row - block.row_begin) * kPanelColumns;
        if (is_last) prefetch_group(params, rows.first + row, group, column, columns);
        multiply<float, Entry>(
            {reinterpret_cast<const Entry*>(chains + row * kLinearChain), kLinearChain},
            {panel, kPanelColumns}, {group_sums, kPanelColumns}, group, vectors, entries, first > 0,
            {}, ahead);
        if (is_last) finish_group(params, rows.first + row, group, column, columns, group_sums);
      }
      chains += rows.count * kLinearChain;
    }
  }
}

void linear_pack(const LinearParams& params, const LinearRows& rows, int64_t begin, int64_t end) {
  switch (params.x_element) {
    case FloatElement::float32:
      return pack_rows<float>(params, rows, begin, end);
    case FloatElement::float16:
      return pack_rows<Half>(params, rows, begin, end);
    case FloatElement::bfloat16:
      return pack_rows<Bfloat16>(params, rows, begin, end);
  }
}

void linear_block(const LinearParams& params, const LinearRows& rows, const LinearBlock& block,
                  float* scratch) {
  const bool float_weight = params.weight_element == FloatElement::float32;
  switch (params.x_element) {
    case FloatElement::float32:
      return multiply_block<float, float>(params, rows, block, scratch);
    case FloatElement::float16:
      return float_weight ? multiply_block<Half, float>(params, rows, block, scratch)
                          : multiply_block<Half, Half>(params, rows, block, scratch);
    case FloatElement::bfloat16:
      return float_weight ? multiply_block<Bfloat16, float>(params, rows, block, scratch)
                          : multiply_block<Bfloat16, Bfloat16>(params, rows, block, scratch);
  }
}

}  // namespace flexvar::FLEXVAR_ISA
