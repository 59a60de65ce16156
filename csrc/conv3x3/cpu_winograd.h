// Winograd's F(2x2, 3x3): squares of 2x2 output pixels from the 4x4 pixels that they see, with 16
// products a channel where the definition takes 36 (Lavin and Gray, 2016, arXiv 1509.09308).
//
//   out = A^T [(G g G^T) * (B^T d B)] A, the products summed over the channels in between: 16
//   products of matrices, of the tiles' transformed pixels with the transformed weights.
#pragma once

#include "conv3x3/cpu_kernel.h"
#include "conv3x3/cpu_weight.h"

namespace flexvar::FLEXVAR_ISA {
namespace winograd {

using Line = Vector<float>[4];
using Square = Line[4];

// Of every row, then of every column.
template <typename Transform>
inline __attribute__((always_inline)) void transform_both_ways(Square& s, Transform transform) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) transform(s[i][0], s[i][1], s[i][2], s[i][3]);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) transform(s[0][j], s[1][j], s[2][j], s[3][j]);
}

// B^T
inline __attribute__((always_inline)) void transform_pixels(Vector<float>& a, Vector<float>& b,
                                                            Vector<float>& c, Vector<float>& d) {
  const Vector<float> before = b;
  a -= c;
  b += c;
  c -= before;
  d = before - d;
}

// G, of three taps.
inline __attribute__((always_inline)) void transform_taps(Vector<float>& a, Vector<float>& b,
                                                          Vector<float>& c, Vector<float>& d) {
  const Vector<float> outer = 0.5f * (a + c), half = 0.5f * b;
  d = c;
  b = outer + half;
  c = outer - half;
}

// A^T, to two numbers.
inline __attribute__((always_inline)) void transform_sums(Vector<float>& a, Vector<float>& b,
                                                          Vector<float>& c, Vector<float>& d) {
  a += b + c;
  b -= c + d;
}

// Channels [first, first + count) of all tiles to [16][tiles][count].
static void transform_map(const Conv3x3Params& params, const WinogradBlock& block, int64_t first,
                          int64_t count, float* map) {
  const float* const x = static_cast<const float*>(params.x);
  for (int64_t tile = 0; tile < block.tiles; ++tile) {
    const int64_t top = 2 * (block.tile_row + tile / block.tile_columns) - 1;
    const int64_t left = 2 * (block.tile_column + tile % block.tile_columns) - 1;
    const float* pixels[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t row = top + i / 4, column = left + i % 4;
      const bool is_inside =
          row >= 0 && row < params.height && column >= 0 && column < params.width;
      pixels[i] = is_inside ? x +
                                  ((block.image * params.height + row) * params.width + column) *
                                      params.in_channels +
                                  first
                            : nullptr;
    }
    for (int64_t c = 0; c < count; c += kFloatLanes) {
      Square square;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        square[i / 4][i % 4] =
            pixels[i] != nullptr ? load_first(pixels[i] + c, count - c) : Vector<float>{};
      }
      transform_both_ways(square, transform_pixels);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        store_first(map + i * kWinogradMapStride + tile * count + c, square[i / 4][i % 4],
                    count - c);
      }
    }
  }
}

// Taps of input channels [first, first + count) and the output channels from `channel` on to
// [16][count][kConvColumns].
static void transform_weight(const Conv3x3Params& params, int64_t channel, int64_t first,
                             int64_t count, float* panel, float* taps) {
  const Conv3x3Channels<float> channels(first, count);
  const int64_t columns = conv3x3_channels(params, channel), tap_size = count * kFloatLanes;
  for (int64_t n = 0; n < columns; n += kFloatLanes) {
    unpack_taps<float, float>(params, channels, channel + n, taps);
    for (int64_t c = 0; c < count; ++c) {
      Square square{};
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) {
        square[i / 3][i % 3] = load(taps + i * tap_size + c * kFloatLanes);
      }
      transform_both_ways(square, transform_taps);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        store(panel + (i * count + c) * kConvColumns + n, square[i / 4][i % 4]);
      }
    }
  }
}

// From [16][tiles][kConvColumns] to the output. Says whether all of it is finite before bias and
// residual.
static bool finish(const Conv3x3Params& params, const WinogradBlock& block, const float* sums) {
  const int64_t channels = conv3x3_channels(params, block.channel);
  const float* const residual = static_cast<const float*>(params.residual);
  float* const out = static_cast<float*>(params.out);
  Vector<float> difference{};
  for (int64_t tile = 0; tile < block.tiles; ++tile, sums += kConvColumns) {
    const int64_t row = 2 * (block.tile_row + tile / block.tile_columns);
    const int64_t column = 2 * (block.tile_column + tile % block.tile_columns);
    for (int64_t n = 0; n < channels; n += kFloatLanes) {
      const int64_t channel = block.channel + n, count = channels - n;
      Square square;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        square[i / 4][i % 4] = load(sums + i * kWinogradSumsStride + n);
      }
      transform_both_ways(square, transform_sums);
      const Vector<float> bias =
          params.bias ? load_first(params.bias + channel, count) : Vector<float>{};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t y = row + i / 2, x = column + i % 2;
        if (y >= params.height || x >= params.width) continue;
        Vector<float> sum = square[i / 2][i % 2];
        difference += sum - sum;
        const int64_t place =
            ((block.image * params.height + y) * params.width + x) * params.out_channels + channel;
        if (params.bias) sum += bias;
        if (residual) sum += load_first(residual + place, count);
        store_first(out + place, sum, count);
      }
    }
  }
  bool is_finite = true;
  for (int64_t i = 0; i < kFloatLanes; ++i) is_finite &= difference[i] == 0;
  return is_finite;
}

static bool convolve(const Conv3x3Params& params, const WinogradBlock& block, const float* panels,
                     bool is_packed, float* map) {
  float* const sums = map + winograd_map_size(params.in_channels);
  float* const panel = sums + kWinogradSumsSize;
  float* const taps = panel + kWinogradPanelSize;
  const int64_t vectors = (conv3x3_channels(params, block.channel) + kFloatLanes - 1) / kFloatLanes;
  if (panels != nullptr) {
    panels += block.channel / kConvColumns * params.in_channels * 16 * kConvColumns;
  }
  for (int64_t first = 0; first < params.in_channels; first += kWinogradChannels) {
    const int64_t left = params.in_channels - first;
    const int64_t count = left < kWinogradChannels ? left : kWinogradChannels;
    if (!is_packed) transform_map(params, block, first, count, map);
    const float* right = panel;
    if (panels != nullptr) {
      right = panels + first * 16 * kConvColumns;
    } else {
      transform_weight(params, block.channel, first, count, panel, taps);
    }
    for (int64_t i = 0; i < 16; ++i) {
      for (int64_t c = 0; c < count; c += kWinogradChain) {
        const int64_t rest = count - c, chain = rest < kWinogradChain ? rest : kWinogradChain;
        multiply<float>({map + i * kWinogradMapStride + c, count},
                        {right + (i * count + c) * kConvColumns, kConvColumns},
                        {sums + i * kWinogradSumsStride, kConvColumns}, block.tiles, vectors, chain,
                        first + c > 0);
      }
    }
    map += 16 * kWinogradMapStride;
  }
  return finish(params, block, sums);
}

}  // namespace winograd
}  // namespace flexvar::FLEXVAR_ISA
