#include "linear/cpu_amx.h"

#include "common/cpu_amx.h"
#include "linear/cpu_amx_weight.h"
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

// A NaN of the tiles' sums is replaced by the definition's.
template <typename X, typename W>
Vector<float> mend(const LinearParams& params, Vector<float> y, int64_t row, int64_t column) {
  for (unsigned nan = _mm512_cmp_ps_mask((__m512)y, (__m512)y, _CMP_UNORD_Q); nan != 0;
       nan &= nan - 1) {
    const int64_t lane = __builtin_ctz(nan);
    if (column + lane >= params.columns) break;
    y[lane] = multiply_plainly(
        static_cast<const X*>(params.x) + row * params.depth,
        static_cast<const W*>(params.weight) + (column + lane) * params.depth, params.depth);
  }
  return y;
}

// The sums [column tiles, row tiles] of a block to the output.
template <typename Out, typename X, typename W>
void finish_tiles(const LinearParams& params, const LinearAmxBlock& block, const float* sums) {
  const LinearAmxRows& rows = block.rows;
  const int64_t row_tiles = (rows.end - rows.begin + kTileRows - 1) / kTileRows;
  const int64_t column_end = block.column_end < params.columns ? block.column_end : params.columns;
  const bool gelu = params.gelu;
  for (int64_t i = 0; i < row_tiles; ++i) {
    const int64_t first = rows.begin + i * kTileRows;
    const int64_t count = rows.end - first < kTileRows ? rows.end - first : kTileRows;
    OutputRow<Out> row[kTileRows];
    for (int64_t j = 0; j < count; ++j) row[j] = OutputRow<Out>(params, first + j);
    const float* tile = sums + i * 256;
    for (int64_t column = block.column_begin; column < column_end; column += kTileRows) {
      const int64_t columns = column_end - column;
      const Vector<float> bias = load_bias(params, column, columns);
      Vector<float> square[kTileRows];
      Vector<float> zeros{};  // NaN where a sum is NaN or infinite
#pragma GCC unroll 16
      for (int64_t j = 0; j < kTileRows; ++j) {
        square[j] = load(tile + j * kTileRows);
        zeros += square[j] * 0.0f;
      }
      tile += row_tiles * 256;
      transpose<float>(square);
      if (kPartsOf<X> > 1 && _mm512_cmp_ps_mask((__m512)zeros, (__m512)zeros, _CMP_UNORD_Q)) {
        for (int64_t j = 0; j < count; ++j) {
          square[j] = mend<X, W>(params, square[j], first + j, column);
        }
      }
      if (count == kTileRows && columns >= kFloatLanes) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < kTileRows; ++j) {
          row[j].finish(square[j], bias, gelu, column, kFloatLanes);
        }
      } else {
        for (int64_t j = 0; j < count; ++j) row[j].finish(square[j], bias, gelu, column, columns);
      }
    }
  }
}

template <typename X, typename W>
void multiply_block(const LinearParams& params, const LinearAmxBlock& block, const char* x_panels,
                    char* scratch) {
  constexpr int parts = kPartsOf<X>;
  const int64_t rows = block.rows.end - block.rows.begin;
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t row_pairs = (row_tiles + 1) / 2;
  float* const sums = reinterpret_cast<float*>(scratch + kLinearAmxPanelBytes);
  const auto sums_of = [&](int64_t column_tile, int64_t row_tile) {
    return sums + (column_tile * row_tiles + row_tile) * 256;
  };

  WeightAhead<parts, W> weight({static_cast<const W*>(params.weight), params.columns, params.depth,
                                block.column_begin, block.column_end},
                               row_pairs, scratch);
  for (; weight.is_left(); weight.next_panel()) {
    const WeightPanel panel = weight.panel();
    const int64_t panel_bytes = panel.steps * parts * kTileBytes;
    const int64_t tile = (panel.column - block.column_begin) / kTileRows;
    const char* x = x_panels + panel.k / kTileDepth * parts * kTileBytes * row_tiles;
    for (int64_t i = 0; i < row_tiles; i += 2, x += 2 * panel_bytes) {
      const char* const right[2] = {x, x + panel_bytes};
      float* const out[2][2] = {{sums_of(tile, i), sums_of(tile, i + 1)},
                                {sums_of(tile + 1, i), sums_of(tile + 1, i + 1)}};
      if (i + 1 < row_tiles) {
        multiply_tiles<parts, 2>(panel.tiles, right, out, panel.steps, panel.k > 0, weight);
      } else {
        multiply_tiles<parts, 1>(panel.tiles, right, out, panel.steps, panel.k > 0, weight);
      }
    }
  }

  switch (params.out_element) {
    case FloatElement::float32:
      return finish_tiles<float, X, W>(params, block, sums);
    case FloatElement::float16:
      return finish_tiles<Half, X, W>(params, block, sums);
    case FloatElement::bfloat16:
      return finish_tiles<Bfloat16, X, W>(params, block, sums);
  }
}

template <typename X>
void pack_rows(const LinearParams& params, const LinearAmxRows& rows, int64_t tile_begin,
               int64_t tile_end, char* panels) {
  constexpr int parts = kPartsOf<X>;
  const int64_t tiles = (rows.end - rows.begin + kTileRows - 1) / kTileRows;
  const X* const x = static_cast<const X*>(params.x);
  for (int64_t k = 0; k < params.depth; k += kTileSteps<parts> * kTileDepth) {
    const int64_t left = params.depth - k;
    const int64_t some =
        left < kTileSteps<parts> * kTileDepth ? left : kTileSteps<parts> * kTileDepth;
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
  const int64_t parts = params.x_element == FloatElement::bfloat16 ? 1 : 3;
  return (params.depth + kTileDepth - 1) / kTileDepth * parts * kTileBytes;
}

void linear_amx_pack(const LinearParams& params, const LinearAmxRows& rows, int64_t tile_begin,
                     int64_t tile_end, char* panels) {
  switch (params.x_element) {
    case FloatElement::float32:
      return pack_rows<float>(params, rows, tile_begin, tile_end, panels);
    case FloatElement::float16:
      return pack_rows<Half>(params, rows, tile_begin, tile_end, panels);
    case FloatElement::bfloat16:
      return pack_rows<Bfloat16>(params, rows, tile_begin, tile_end, panels);
  }
}

void linear_amx_block(const LinearParams& params, const LinearAmxBlock& block, const char* x_panels,
                      char* scratch) {
  const TileScope scope;
  const bool float_weight = params.weight_element == FloatElement::float32;
  switch (params.x_element) {
    case FloatElement::float32:
      return multiply_block<float, float>(params, block, x_panels, scratch);
    case FloatElement::float16:
      return float_weight ? multiply_block<Half, float>(params, block, x_panels, scratch)
                          : multiply_block<Half, Half>(params, block, x_panels, scratch);
    case FloatElement::bfloat16:
      return float_weight ? multiply_block<Bfloat16, float>(params, block, x_panels, scratch)
                          : multiply_block<Bfloat16, Bfloat16>(params, block, x_panels, scratch);
  }
}

}  // namespace flexvar::FLEXVAR_ISA
