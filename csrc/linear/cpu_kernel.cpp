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
  using Packed = Lines<float>;
  constexpr int64_t of_entry = kElementsPerEntry<Entry>, elements = kLinearChain * of_entry;
  static_assert(kLinearGroup == kRegisterRows && kLinearChain % Packed::kLine == 0 &&
                Packed::kLine % kFloatLanes == 0);
  const X* const x = static_cast<const X*>(params.x) + rows.first * params.depth;
  for (int64_t i = begin; i < end; ++i) {
    float* chain = rows.entries + i / kLinearGroup * kLinearGroup * kLinearChain +
                   i % kLinearGroup * Packed::kLine;
    for (int64_t first = 0; first < params.depth; first += elements) {
      const X* const x_chain = x + i * params.depth + first;
      const int64_t left = params.depth - first, count = left < elements ? left : elements;
      for (int64_t k = 0; k < count; k += kFloatLanes * of_entry) {
        const int64_t entry = k / of_entry, line = entry / Packed::kLine;
        store(chain + line * kLinearGroup * Packed::kLine + entry % Packed::kLine,
              load_entries<Entry>(x_chain + k, count - k));
      }
      chain += rows.entries_in_chain();
    }
  }
}

// All rows meet a panel of the weight, which stays in the L1 cache, a few at a time; and all panels
// of the block a chain of the rows, which stays in the L2 cache. Every sum has one order, given by
// the depth alone.
template <typename X, typename W>
static void multiply_panels(const LinearParams& params, const LinearRows& rows,
                            const LinearBlock& block, float* scratch) {
  using Entry = typename EntryOf<X>::Type;
  constexpr int64_t of_entry = kElementsPerEntry<Entry>, elements = kLinearChain * of_entry;
  float* const panel = scratch + kLinearRows * kLinearColumns;
  const int64_t depth = params.depth;
  const W* const weights = static_cast<const W*>(params.weight);
  const auto columns_of = [&](int64_t column, int64_t end) {
    return end - column < kPanelColumns ? end - column : kPanelColumns;
  };
  const auto elements_of = [&](int64_t first) {
    return depth - first < elements ? depth - first : elements;
  };

  const float* chains = rows.entries;
  for (int64_t first = 0; first < depth; first += elements) {
    const int64_t count = elements_of(first), entries = (count + of_entry - 1) / of_entry;
    const bool is_last = first + count == depth;
    for (int64_t column = block.column_begin; column < block.column_end; column += kPanelColumns) {
      const int64_t columns = columns_of(column, block.column_end);
      const int64_t vectors = (columns + kFloatLanes - 1) / kFloatLanes;
      float* const sums = scratch + (column - block.column_begin) * kLinearRows;
      pack_panel<Entry>(panel, weights + column * depth + first, depth, columns, count);
      int64_t next_column = column + kPanelColumns, next_first = first;
      if (next_column >= block.column_end && !is_last) {
        next_column = block.column_begin;
        next_first += elements;
      } else if (next_column >= block.column_end) {
        next_first = 0;  // of the next block
      }
      const int64_t next_columns =
          next_column < params.columns ? columns_of(next_column, params.columns) : 0;
      const int64_t steps = (block.row_end - block.row_begin + kRegisterRows - 1) / kRegisterRows *
                            ((entries + Lines<float>::kLine - 1) / Lines<float>::kLine);
      LinesAhead ahead(weights + next_column * depth + next_first, next_columns,
                       elements_of(next_first) * sizeof(W), depth * sizeof(W), steps);
      for (int64_t row = block.row_begin; row < block.row_end; row += kRegisterRows) {
        const int64_t rows_left = block.row_end - row;
        const int64_t group = rows_left < kRegisterRows ? rows_left : kRegisterRows;
        float* const group_sums = sums + (row - block.row_begin) * kPanelColumns;
        if (is_last) prefetch_group(params, rows.first + row, group, column, columns);
        const Lines<const Entry> x{reinterpret_cast<const Entry*>(chains + row * kLinearChain),
                                   kLinearChain};
        multiply_left<Lines<const Entry>, float>(x, {panel, kPanelColumns},
                                                 {group_sums, kPanelColumns}, group, vectors,
                                                 entries, first > 0, ahead);
        if (is_last) finish_group(params, rows.first + row, group, column, columns, group_sums);
      }
    }
    chains += rows.entries_in_chain();
  }
}

template <typename X, typename W>
static void multiply_block(const LinearParams& params, const LinearRows& rows,
                           const LinearBlock& block, float* scratch) {
  // Rows that stay in the L2 cache with all of their chains meet one panel at a time: the weight's
  // rows are then read from end to end.
  constexpr int64_t kFew = 1 << 16;  // entries, 256 KiB
  const bool are_few =
      LinearRows::packed_size(block.row_end - block.row_begin, params.depth) <= kFew;
  const int64_t step = are_few ? kPanelColumns : kLinearColumns;
  LinearBlock part = block;
  for (; part.column_begin < block.column_end; part.column_begin += step) {
    const int64_t end = part.column_begin + step;
    part.column_end = end < block.column_end ? end : block.column_end;
    multiply_panels<X, W>(params, rows, part, scratch);
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
