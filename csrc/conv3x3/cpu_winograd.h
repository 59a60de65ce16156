// Winograd's way (Lavin and Gray, 2016, arXiv 1509.09308): squares of output pixels from all that
// they see, in fewer products than the definition takes. F(2x2, 3x3) makes 4 from 16 products a
// channel instead of 36; F(4x4, 3x3) 16 from 36 instead of 144, and errs more.
//
//   out = A^T [(G g G^T) * (B^T d B)] A, the products summed over the channels in between: 16 or 36
//   products of matrices, of the tiles' transformed pixels with the transformed weights.
#pragma once

#include "conv3x3/cpu_kernel.h"
#include "conv3x3/cpu_weight.h"

namespace flexvar::FLEXVAR_ISA {
namespace winograd {

using Line = Vector<float>;

// B^T, G and A^T, each of a line of numbers, in place: what a line sees, three taps, and products.
struct TwoByTwo {
  static inline __attribute__((always_inline)) void pixels(Line& a, Line& b, Line& c, Line& d) {
    const Line before = b;
    a -= c;
    b += c;
    c -= before;
    d = before - d;
  }
  static inline __attribute__((always_inline)) void taps(Line& a, Line& b, Line& c, Line& d) {
    const Line outer = 0.5f * (a + c), half = 0.5f * b;
    d = c;
    b = outer + half;
    c = outer - half;
  }
  static inline __attribute__((always_inline)) void sums(Line& a, Line& b, Line& c, Line& d) {
    a += b + c;
    b -= c + d;
  }
};

struct FourByFour {
  static inline __attribute__((always_inline)) void pixels(Line& a, Line& b, Line& c, Line& d,
                                                           Line& e, Line& f) {
    const Line even = e - 4.0f * c, odd = d - 4.0f * b;
    const Line even_2 = e - c, odd_2 = 2.0f * (d - b);
    a = 4.0f * a + (even - c);
    f = (4.0f * b - 5.0f * d) + f;
    b = even + odd;
    c = even - odd;
    d = even_2 + odd_2;
    e = even_2 - odd_2;
  }
  static inline __attribute__((always_inline)) void taps(Line& a, Line& b, Line& c, Line& d,
                                                         Line& e, Line& f) {
    const Line outer = (a + c) * (-1 / 6.0f), middle = b * (1 / 6.0f);
    const Line outer_2 = a * (1 / 24.0f) + c * (1 / 6.0f), middle_2 = b * (1 / 12.0f);
    f = c;
    a = 0.25f * a;
    b = outer - middle;
    c = outer + middle;
    d = outer_2 + middle_2;
    e = outer_2 - middle_2;
  }
  static inline __attribute__((always_inline)) void sums(Line& a, Line& b, Line& c, Line& d,
                                                         Line& e, Line& f) {
    const Line even = b + c, odd = b - c, even_2 = d + e, odd_2 = d - e;
    a += even + even_2;
    b = odd + 2.0f * odd_2;
    c = even + 4.0f * even_2;
    d = (odd + 8.0f * odd_2) + f;
  }
};

template <typename T>
struct TilesOf {
  using Type = FourByFour;
  static constexpr Winograd sizes = kWinogradBfloat16;
};
template <>
struct TilesOf<float> {
  using Type = TwoByTwo;
  static constexpr Winograd sizes = kWinogradFloat32;
};

// Calls transform(a reference to each number of a line).
template <int kSide, typename At, typename Transform>
static inline __attribute__((always_inline)) void with_line(At at, Transform transform) {
  if constexpr (kSide == 4) transform(at(0), at(1), at(2), at(3));
  if constexpr (kSide == 6) transform(at(0), at(1), at(2), at(3), at(4), at(5));
}

// The first kRows rows, then the first kColumns columns.
template <int kRows, int kColumns, int kSide, typename Transform>
static inline __attribute__((always_inline)) void transform_both_ways(Line (&s)[kSide][kSide],
                                                                      Transform transform) {
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    with_line<kSide>([&](int j) __attribute__((always_inline)) -> Line& { return s[i][j]; },
                     transform);
  }
#pragma GCC unroll 6
  for (int j = 0; j < kColumns; ++j) {
    with_line<kSide>([&](int i) __attribute__((always_inline)) -> Line& { return s[i][j]; },
                     transform);
  }
}

// Channels [first, first + count) of all tiles to [products][tiles][count].
template <typename T>
static void transform_map(const Conv3x3Params& params, const WinogradBlock& block, int64_t first,
                          int64_t count, float* map) {
  using Tiles = typename TilesOf<T>::Type;
  constexpr Winograd sizes = TilesOf<T>::sizes;
  constexpr int kSide = sizes.side();
  alignas(64) static constexpr T kOutside[kWinogradChannels] = {};
  const T* const x = static_cast<const T*>(params.x);
  const int64_t to_next_tile = sizes.outputs * params.in_channels;
  for (int64_t tile = 0; tile < block.tiles; ++tile) {
    const int64_t top = sizes.outputs * (block.tile_row + tile / block.tile_columns) - 1;
    const int64_t left = sizes.outputs * (block.tile_column + tile % block.tile_columns) - 1;
    const T* pixels[kSide * kSide];
    for (int64_t i = 0; i < kSide * kSide; ++i) {
      const int64_t row = top + i / kSide, column = left + i % kSide;
      const bool is_inside =
          row >= 0 && row < params.height && column >= 0 && column < params.width;
      pixels[i] = is_inside ? x +
                                  ((block.image * params.height + row) * params.width + column) *
                                      params.in_channels +
                                  first
                            : kOutside;
    }
    float* const place = map + tile * count;
    const auto transform = [&](int64_t c, int64_t left) __attribute__((always_inline)) {
      Line square[kSide][kSide];
#pragma GCC unroll 36
      for (int i = 0; i < kSide * kSide; ++i) {
        square[i / kSide][i % kSide] = load_first(pixels[i] + c, left);
        // The next tile's; two columns of it are this one's, too.
        if (i % kSide >= 2) __builtin_prefetch(pixels[i] + to_next_tile + c);
      }
      transform_both_ways<kSide, kSide>(
          square, [](auto&... line) __attribute__((always_inline)) { Tiles::pixels(line...); });
      // Vectors may end behind the last channel, where the next tile comes to stand.
#pragma GCC unroll 36
      for (int i = 0; i < kSide * kSide; ++i) {
        store(place + i * kWinogradMapStride + c, square[i / kSide][i % kSide]);
      }
    };
    int64_t c = 0;
    for (; c + kFloatLanes <= count; c += kFloatLanes) transform(c, kFloatLanes);
    if (c < count) transform(c, count - c);
  }
}

// Taps of input channels [first, first + count) and the output channels from `channel` on to
// [products][count][kConvColumns].
template <typename T, typename W>
static void transform_weight(const Conv3x3Params& params, int64_t channel, int64_t first,
                             int64_t count, float* panel, float* taps) {
  using Tiles = typename TilesOf<T>::Type;
  constexpr Winograd sizes = TilesOf<T>::sizes;
  constexpr int kSide = sizes.side();
  const Conv3x3Channels<float> channels(first, count);
  const int64_t columns = conv3x3_channels(params, channel), tap_size = count * kFloatLanes;
  for (int64_t n = 0; n < columns; n += kFloatLanes) {
    unpack_taps<float, W>(params, channels, channel + n, taps);
    for (int64_t c = 0; c < count; ++c) {
      Line square[kSide][kSide] = {};
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) {
        square[i / 3][i % 3] = load(taps + i * tap_size + c * kFloatLanes);
      }
      transform_both_ways<3, kSide>(
          square, [](auto&... line) __attribute__((always_inline)) { Tiles::taps(line...); });
#pragma GCC unroll 36
      for (int i = 0; i < kSide * kSide; ++i) {
        store(panel + i * kWinogradPanelStride + c * kConvColumns + n,
              square[i / kSide][i % kSide]);
      }
    }
  }
}

// From [products][tiles][kConvColumns] to the output. Where a tile's sums aren't finite, they may
// be so by the definition, or another infinity: then redo(row, column), which are its first
// pixel's.
template <typename T, typename Redo>
static void finish(const Conv3x3Params& params, const WinogradBlock& block, const float* sums,
                   Redo redo) {
  using Tiles = typename TilesOf<T>::Type;
  constexpr Winograd sizes = TilesOf<T>::sizes;
  constexpr int kSide = sizes.side(), kOutputs = sizes.outputs;
  const int64_t channels = conv3x3_channels(params, block.channel);
  const T* const residual = static_cast<const T*>(params.residual);
  T* const out = static_cast<T*>(params.out);
  for (int64_t tile = 0; tile < block.tiles; ++tile, sums += kConvColumns) {
    const int64_t row = kOutputs * (block.tile_row + tile / block.tile_columns);
    const int64_t column = kOutputs * (block.tile_column + tile % block.tile_columns);
    Vector<float> difference{};
    const auto transform = [&](int64_t n, int64_t count) __attribute__((always_inline)) {
      const int64_t channel = block.channel + n;
      Line square[kSide][kSide];
#pragma GCC unroll 36
      for (int i = 0; i < kSide * kSide; ++i) {
        square[i / kSide][i % kSide] = load(sums + i * kWinogradSumsStride + n);
      }
      transform_both_ways<kSide, kOutputs>(
          square, [](auto&... line) __attribute__((always_inline)) { Tiles::sums(line...); });
      const Vector<float> bias =
          params.bias ? load_first(params.bias + channel, count) : Vector<float>{};
#pragma GCC unroll 16
      for (int i = 0; i < kOutputs * kOutputs; ++i) {
        const int64_t y = row + i / kOutputs, x = column + i % kOutputs;
        if (y >= params.height || x >= params.width) continue;
        Vector<float> sum = square[i / kOutputs][i % kOutputs];
        difference += sum - sum;
        const int64_t place =
            ((block.image * params.height + y) * params.width + x) * params.out_channels + channel;
        if (params.bias) sum += bias;
        if (residual) sum += load_first(residual + place, count);
        store_first(out + place, sum, count);
      }
    };
    int64_t n = 0;
    for (; n + kFloatLanes <= channels; n += kFloatLanes) transform(n, kFloatLanes);
    if (n < channels) transform(n, channels - n);
    bool is_finite = true;
    for (int64_t i = 0; i < kFloatLanes; ++i) is_finite &= difference[i] == 0;
    if (!is_finite) redo(row, column);
  }
}

template <typename T, typename W, typename Redo>
static void convolve(const Conv3x3Params& params, const WinogradBlock& block, const float* panels,
                     bool is_packed, float* map, Redo redo) {
  constexpr Winograd sizes = TilesOf<T>::sizes;
  float* const sums = map + sizes.map_size(params.in_channels);
  float* const panel = sums + sizes.sums_size();
  float* const taps = panel + sizes.panel_size();
  const int64_t vectors = (conv3x3_channels(params, block.channel) + kFloatLanes - 1) / kFloatLanes;
  const float* right = panels;
  if (panels != nullptr) {
    right +=
        block.channel / kConvColumns * sizes.channel_steps(params.in_channels) * sizes.panel_size();
  }
  for (int64_t first = 0; first < params.in_channels; first += kWinogradChannels) {
    const int64_t left = params.in_channels - first;
    const int64_t count = left < kWinogradChannels ? left : kWinogradChannels;
    if (!is_packed) transform_map<T>(params, block, first, count, map);
    if (panels == nullptr) {
      transform_weight<T, W>(params, block.channel, first, count, panel, taps);
      right = panel;
    }
    for (int64_t i = 0; i < sizes.products(); ++i) {
      for (int64_t c = 0; c < count; c += sizes.chain) {
        const int64_t rest = count - c, chain = rest < sizes.chain ? rest : sizes.chain;
        multiply<float>({map + i * kWinogradMapStride + c, count},
                        {right + i * kWinogradPanelStride + c * kConvColumns, kConvColumns},
                        {sums + i * kWinogradSumsStride, kConvColumns}, block.tiles, vectors, chain,
                        first + c > 0);
      }
    }
    map += sizes.products() * kWinogradMapStride;
    right += sizes.panel_size();
  }
  finish<T>(params, block, sums,
            [&](int64_t row, int64_t column) { redo(row, column, taps + sizes.taps_size()); });
}

}  // namespace winograd
}  // namespace flexvar::FLEXVAR_ISA
