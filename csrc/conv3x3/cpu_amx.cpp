#include "conv3x3/cpu_amx.h"

#include "common/cpu_amx.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

template <typename T>
constexpr int kPartsOf = __is_same(T, Bfloat16) ? 1 : 3;

template <typename T>
void pack_x(const Conv3x3Params& params, int64_t unit_begin, int64_t unit_end) {
  constexpr int parts = kPartsOf<T>;
  const int64_t rows = params.padded_height(), columns = params.padded_width();
  const int64_t blocks = params.channel_blocks();
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t image = unit / (rows * blocks), block = unit / rows % blocks;
    const int64_t y = unit % rows - params.pad_before();
    char* const place = params.x_tiles + (image * blocks + block) * params.block_bytes() +
                        unit % rows * columns * 64;
    const int64_t channels = params.in_channels - block * kTileDepth;
    const T* const line = static_cast<const T*>(params.x) +
                          (image * params.height + y) * params.width * params.in_channels +
                          block * kTileDepth;
    const int64_t first = params.pad_before();
    const int64_t last = y < 0 || y >= params.height ? first : first + params.width;
    for (int64_t x = 0; x < columns; ++x) {
      TileVectors<parts> vectors{};
      if (x >= first && x < last) {
        const T* const pixel = line + (x - first) * params.in_channels;
        vectors = channels >= kTileDepth ? load_tile_vectors<parts>(pixel)
                                         : load_last_tile_vectors<parts>(pixel, channels);
      }
#pragma GCC unroll 3
      for (int part = 0; part < parts; ++part) {
        _mm512_store_si512(place + part * params.part_bytes() + x * 64, vectors.part[part]);
      }
    }
  }
}

// Nearest x2 and three taps are two taps: even outputs see the input before through the first of
// the three, their own through the sum of the others; odd ones mirrored.
float folded(const float (&taps)[3][3], int64_t phase, int64_t tap) {
  const int64_t y = phase / 2, x = phase % 2, a = tap / 2, b = tap % 2;
  const int64_t row_begin = a == 0 ? 0 : 1 + y, row_end = a == 0 ? 1 + y : 3;
  const int64_t column_begin = b == 0 ? 0 : 1 + x, column_end = b == 0 ? 1 + x : 3;
  float sum = 0;
  for (int64_t i = row_begin; i < row_end; ++i) {
    for (int64_t j = column_begin; j < column_end; ++j) sum += taps[i][j];
  }
  return sum;
}

template <int kParts, typename W>
void pack_weight(const Conv3x3Params& params, int64_t unit_begin, int64_t unit_end) {
  const int64_t blocks = params.channel_blocks(), taps = params.taps();
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t tile = unit / blocks, block = unit % blocks;
    const int64_t columns = params.out_channels - tile * kTileRows;
    const int64_t channels = params.in_channels - block * kTileDepth;
    for (int64_t phase = 0; phase < params.phases(); ++phase) {
      float rows[9][kTileRows][kTileDepth] = {};
      for (int64_t i = 0; i < kTileRows && i < columns; ++i) {
        const W* const weight =
            static_cast<const W*>(params.weight) +
            ((tile * kTileRows + i) * params.in_channels + block * kTileDepth) * 9;
        for (int64_t c = 0; c < kTileDepth && c < channels; ++c) {
          if (params.phases() == 1) {
            for (int64_t tap = 0; tap < 9; ++tap) rows[tap][i][c] = to_float(weight[c * 9 + tap]);
            continue;
          }
          float numbers[3][3];
          for (int64_t tap = 0; tap < 9; ++tap) {
            numbers[tap / 3][tap % 3] = to_float(weight[c * 9 + tap]);
          }
          for (int64_t tap = 0; tap < 4; ++tap) rows[tap][i][c] = folded(numbers, phase, tap);
        }
      }
      char* const panel =
          params.weight_panels +
          ((phase * params.column_tiles() + tile) * blocks + block) * params.weight_block_bytes();
      for (int64_t tap = 0; tap < taps; ++tap) {
        pack_right_panel<kParts>(panel + tap * kParts * kTileBytes, rows[tap][0], kTileDepth,
                                 kTileRows, kTileDepth);
      }
    }
  }
}

// A sum that the tiles gave as NaN, by the definition: a part of a factor may have been infinite,
// or infinity less infinity, where the factor was not.
template <typename T, typename W>
float convolve_plainly(const Conv3x3Params& params, int64_t image, int64_t y, int64_t x,
                       int64_t channel) {
  const bool up = params.resize == ConvResize::up;
  const int64_t height = up ? 2 * params.height : params.height;
  const int64_t width = up ? 2 * params.width : params.width;
  const W* const weight = static_cast<const W*>(params.weight) + channel * params.in_channels * 9;
  float sum = 0;
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t row = y * params.stride() + tap / 3 - params.pad_before();
    const int64_t column = x * params.stride() + tap % 3 - params.pad_before();
    if (row < 0 || row >= height || column < 0 || column >= width) continue;
    const T* const pixel = static_cast<const T*>(params.x) +
                           ((image * params.height + (up ? row / 2 : row)) * params.width +
                            (up ? column / 2 : column)) *
                               params.in_channels;
    for (int64_t c = 0; c < params.in_channels; ++c) {
      sum += to_float(pixel[c]) * to_float(weight[c * 9 + tap]);
    }
  }
  return sum;
}

template <typename T, typename W>
void finish_block(const Conv3x3Params& params, const Conv3x3Block& block, const float* sums) {
  const int64_t scale = params.resize == ConvResize::up ? 2 : 1;
  const int64_t columns = block.column_tile_end - block.column_tile_begin;
  for (int64_t i = 0; i < block.tiles; ++i) {
    const int64_t tile = block.first_tile + i;
    const int64_t y = tile / params.tiles_in_row() * scale + block.phase / 2;
    const int64_t first = tile % params.tiles_in_row() * kTileRows;
    for (int64_t j = 0; j < kTileRows && first + j < params.grid_width(); ++j) {
      const int64_t x = (first + j) * scale + block.phase % 2;
      const int64_t place =
          ((block.image * params.out_height + y) * params.out_width + x) * params.out_channels;
      for (int64_t n = 0; n < columns; ++n) {
        const int64_t channel = (block.column_tile_begin + n) * kTileRows;
        const int64_t count = params.out_channels - channel;
        Vector<float> sum = load(sums + (i * columns + n) * 256 + j * kTileRows);
        if (kPartsOf<T> > 1) {
          for (unsigned nan = _mm512_cmp_ps_mask((__m512)sum, (__m512)sum, _CMP_UNORD_Q); nan != 0;
               nan &= nan - 1) {
            const int64_t lane = __builtin_ctz(nan);
            if (lane < count) {
              sum[lane] = convolve_plainly<T, W>(params, block.image, y, x, channel + lane);
            }
          }
        }
        if (params.bias) sum += load_first(params.bias + channel, count);
        if (params.residual) {
          sum += load_first(static_cast<const T*>(params.residual) + place + channel, count);
        }
        store_first(static_cast<T*>(params.out) + place + channel, sum, count);
      }
    }
  }
}

template <typename T, typename W>
void convolve_block(const Conv3x3Params& params, const Conv3x3Block& block, float* sums) {
  constexpr int parts = kPartsOf<T>;
  const int64_t blocks = params.channel_blocks(), line = params.padded_width() * 64;
  const int64_t columns = block.column_tile_end - block.column_tile_begin;
  int64_t steps[9];
  for (int64_t tap = 0; tap < params.taps(); ++tap) {
    steps[tap] = params.phases() == 1
                     ? tap / 3 * line + tap % 3 * 64
                     : (tap / 2 + block.phase / 2) * line + (tap % 2 + block.phase % 2) * 64;
  }
  const auto tile_at = [&](int64_t i) {
    const int64_t tile = block.first_tile + i;
    return tile / params.tiles_in_row() * params.stride() * line +
           tile % params.tiles_in_row() * kTileRows * params.stride() * 64;
  };

  for (int64_t c = 0; c < blocks; ++c) {
    const char* const x = params.x_tiles + (block.image * blocks + c) * params.block_bytes();
    for (int64_t n = 0; n < columns; n += 2) {
      const char* const panel =
          params.weight_panels +
          ((block.phase * params.column_tiles() + block.column_tile_begin + n) * blocks + c) *
              params.weight_block_bytes();
      const char* const right[2] = {panel, panel + blocks * params.weight_block_bytes()};
      for (int64_t i = 0; i < block.tiles; i += 2) {
        // Behind the last tile the last one again, for sums that nobody reads.
        const int64_t other = i + 1 < block.tiles ? i + 1 : i;
        alignas(64) float spare[2][256];
        const LeftTiles left{
            {x + tile_at(i), x + tile_at(other)}, steps, params.part_bytes(), params.stride() * 64};
        float* const first = sums + (i * columns + n) * 256;
        float* const second = other > i ? first + columns * 256 : spare[0];
        float* const out[2][2] = {{first, first + 256},
                                  {second, other > i ? second + 256 : spare[1]}};
        if (n + 1 < columns) {
          multiply_tiles<parts, 2>(left, right, out, params.taps(), c > 0);
        } else {
          multiply_tiles<parts, 1>(left, right, out, params.taps(), c > 0);
        }
      }
    }
  }
  finish_block<T, W>(params, block, sums);
}

}  // namespace

void conv3x3_pack_x(const Conv3x3Params& params, int64_t unit_begin, int64_t unit_end) {
  params.element == ConvElement::float32 ? pack_x<float>(params, unit_begin, unit_end)
                                         : pack_x<Bfloat16>(params, unit_begin, unit_end);
}

void conv3x3_pack_weight(const Conv3x3Params& params, int64_t unit_begin, int64_t unit_end) {
  if (params.element == ConvElement::float32) {
    return pack_weight<3, float>(params, unit_begin, unit_end);
  }
  params.weight_element == ConvElement::float32
      ? pack_weight<1, float>(params, unit_begin, unit_end)
      : pack_weight<1, Bfloat16>(params, unit_begin, unit_end);
}

void conv3x3_block(const Conv3x3Params& params, const Conv3x3Block& block, char* scratch) {
  const TileScope scope;
  float* const sums = reinterpret_cast<float*>(scratch);
  if (params.element == ConvElement::float32) {
    return convolve_block<float, float>(params, block, sums);
  }
  params.weight_element == ConvElement::float32
      ? convolve_block<Bfloat16, float>(params, block, sums)
      : convolve_block<Bfloat16, Bfloat16>(params, block, sums);
}

}  // namespace flexvar::FLEXVAR_ISA
