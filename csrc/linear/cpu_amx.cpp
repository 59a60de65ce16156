#include "linear/cpu_amx.h"

#include "common/cpu_amx.h"
#include "linear/cpu_epilogue.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

template <typename X>
constexpr int kPartsOf = 3;
template <>
constexpr int kPartsOf<Bfloat16> = 1;

// A product whose tiles gave NaN, by the definition: a part of a factor may have been infinite, or
// infinity less infinity, where the factor was not.
template <typename X, typename W>
float multiply_plainly(const X* x, const W* w, int64_t depth) {
  float sum = 0;
  for (int64_t k = 0; k < depth; ++k) sum += to_float(x[k]) * to_float(w[k]);
  return sum;
}

template <typename X, typename W>
void multiply_block(const LinearParams& params, const LinearAmxBlock& block, const char* x_panels,
                    char* scratch) {
  constexpr int parts = kPartsOf<X>;
  const int64_t rows = block.rows.end - block.rows.begin, depth = params.depth;
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  char* const weight_panel = scratch;
  float* const sums = reinterpret_cast<float*>(scratch + kLinearAmxPanelBytes);
  float* const lines = sums + kLinearAmxColumns / kTileRows * kLinearAmxMaxRows / kTileRows * 256;
  const W* const weights = static_cast<const W*>(params.weight);
  const auto sums_of = [&](int64_t column_tile, int64_t row_tile) {
    return sums + (column_tile * row_tiles + row_tile) * 256;
  };

  for (int64_t k = 0; k < depth; k += kTileChain<parts> * kTileDepth) {
    const int64_t some =
        depth - k < kTileChain<parts> * kTileDepth ? depth - k : kTileChain<parts> * kTileDepth;
    const int64_t steps = (some + kTileDepth - 1) / kTileDepth;
    const int64_t panel_bytes = steps * parts * kTileBytes;
    for (int64_t column = block.column_begin; column < block.column_end; column += 2 * kTileRows) {
      for (int half = 0; half < 2; ++half) {
        // Behind the last column the last one again: sums that nobody reads.
        const int64_t last = params.columns - 1;
        const int64_t begin = column + half * kTileRows < last ? column + half * kTileRows : last;
        pack_left_panel<parts>(weight_panel + half * panel_bytes, weights + begin * depth + k,
                               depth, params.columns - begin, some, 2 * kTileRows * depth);
      }
      const int64_t tile = (column - block.column_begin) / kTileRows;
      const char* const left[2] = {weight_panel, weight_panel + panel_bytes};
      for (int64_t i = 0; i < row_tiles; i += 2) {
        const char* const x = x_panels + i * panel_bytes;
        const char* const right[2] = {x, x + panel_bytes};
        float* const out[2][2] = {{sums_of(tile, i), sums_of(tile, i + 1)},
                                  {sums_of(tile + 1, i), sums_of(tile + 1, i + 1)}};
        if (i + 1 < row_tiles) {
          multiply_panels<parts, 2>(left, right, out, steps, k > 0);
        } else {
          multiply_panels<parts, 1>(left, right, out, steps, k > 0);
        }
      }
    }
    x_panels += row_tiles * panel_bytes;
  }

  for (int64_t i = 0; i < row_tiles; ++i) {
    const int64_t first = block.rows.begin + i * kTileRows;
    const int64_t last = first + kTileRows < block.rows.end ? first + kTileRows : block.rows.end;
    for (int64_t column = block.column_begin; column < block.column_end; column += kTileRows) {
      const int64_t offset = column - block.column_begin;
      const float* const tile = sums_of(offset / kTileRows, i);
      Vector<float> square[kTileRows];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kTileRows; ++j) square[j] = load(tile + j * kTileRows);
      transpose<float>(square);
      unsigned nan[kTileRows], any = 0;
#pragma GCC unroll 16
      for (int64_t j = 0; j < kTileRows; ++j) {
        store(lines + j * kLinearAmxColumns + offset, square[j]);
        nan[j] = _mm512_cmp_ps_mask((__m512)square[j], (__m512)square[j], _CMP_UNORD_Q);
        any |= nan[j];
      }
      if (parts == 1 || !any) continue;
      for (int64_t row = first; row < last; ++row) {
        for (unsigned left = nan[row - first]; left != 0; left &= left - 1) {
          const int64_t j = column + __builtin_ctz(left);
          if (j >= params.columns) break;
          lines[(row - first) * kLinearAmxColumns + offset + j - column] = multiply_plainly(
              static_cast<const X*>(params.x) + row * depth, weights + j * depth, depth);
        }
      }
    }
    const LinearBlock part{first, last, block.column_begin,
                           block.column_end < params.columns ? block.column_end : params.columns};
    switch (params.out_element) {
      case LinearElement::float32:
        finish_block<float>(params, part, lines);
        break;
      case LinearElement::float16:
        finish_block<Half>(params, part, lines);
        break;
      case LinearElement::bfloat16:
        finish_block<Bfloat16>(params, part, lines);
        break;
    }
  }
}

template <typename X>
void pack_rows(const LinearParams& params, const LinearAmxRows& rows, int64_t tile_begin,
               int64_t tile_end, char* panels) {
  constexpr int parts = kPartsOf<X>;
  const int64_t tiles = (rows.end - rows.begin + kTileRows - 1) / kTileRows;
  const X* const x = static_cast<const X*>(params.x);
  for (int64_t k = 0; k < params.depth; k += kTileChain<parts> * kTileDepth) {
    const int64_t left = params.depth - k;
    const int64_t some =
        left < kTileChain<parts> * kTileDepth ? left : kTileChain<parts> * kTileDepth;
    const int64_t panel_bytes = (some + kTileDepth - 1) / kTileDepth * parts * kTileBytes;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t row = rows.begin + tile * kTileRows;
      pack_right_panel<parts>(panels + tile * panel_bytes, x + row * params.depth + k, params.depth,
                              rows.end - row, some);
    }
    panels += tiles * panel_bytes;
  }
}

}  // namespace

int64_t linear_amx_panel_bytes(const LinearParams& params) {
  const int64_t parts = params.x_element == LinearElement::bfloat16 ? 1 : 3;
  return (params.depth + kTileDepth - 1) / kTileDepth * parts * kTileBytes;
}

void linear_amx_pack(const LinearParams& params, const LinearAmxRows& rows, int64_t tile_begin,
                     int64_t tile_end, char* panels) {
  switch (params.x_element) {
    case LinearElement::float32:
      return pack_rows<float>(params, rows, tile_begin, tile_end, panels);
    case LinearElement::float16:
      return pack_rows<Half>(params, rows, tile_begin, tile_end, panels);
    case LinearElement::bfloat16:
      return pack_rows<Bfloat16>(params, rows, tile_begin, tile_end, panels);
  }
}

void linear_amx_block(const LinearParams& params, const LinearAmxBlock& block, const char* x_panels,
                      char* scratch) {
  const TileScope scope;
  const bool float_weight = params.weight_element == LinearElement::float32;
  switch (params.x_element) {
    case LinearElement::float32:
      return multiply_block<float, float>(params, block, x_panels, scratch);
    case LinearElement::float16:
      return float_weight ? multiply_block<Half, float>(params, block, x_panels, scratch)
                          : multiply_block<Half, Half>(params, block, x_panels, scratch);
    case LinearElement::bfloat16:
      return float_weight ? multiply_block<Bfloat16, float>(params, block, x_panels, scratch)
                          : multiply_block<Bfloat16, Bfloat16>(params, block, x_panels, scratch);
  }
}

}  // namespace flexvar::FLEXVAR_ISA
