// The weight of a block's channels as its product reads it.
#pragma once

#include "common/cpu_entry.h"
#include "conv3x3/cpu_kernel.h"

namespace flexvar::FLEXVAR_ISA {

// Input channels that a product takes at a time, all taps of a row of them.
template <typename Entry>
struct Conv3x3Channels {
  int64_t first, count, entries;

  Conv3x3Channels(const Conv3x3Params& params, const Conv3x3Product& product, int64_t begin)
      : first(begin), count(conv3x3_entries(product) * kElementsPerEntry<Entry>) {
    const int64_t left = params.in_channels - first;
    if (left < count) count = left;
    entries = (count + kElementsPerEntry<Entry> - 1) / kElementsPerEntry<Entry>;
  }
  Conv3x3Channels(int64_t first, int64_t count)
      : first(first),
        count(count),
        entries((count + kElementsPerEntry<Entry> - 1) / kElementsPerEntry<Entry>) {}
  // A multiple of what an entry holds.
  int64_t padded() const { return entries * kElementsPerEntry<Entry>; }
  int64_t end() const { return first + count; }
};

// The output channels of a step.
static inline int64_t conv3x3_channels(const Conv3x3Params& params, int64_t channel) {
  const int64_t left = params.out_channels - channel;
  return left < kConvColumns ? left : kConvColumns;
}
// A run of numbers of kFloatLanes rows to vectors over the rows, number i to place(i).
template <typename W, typename Place>
static inline void transpose_run(const W* const (&rows)[kFloatLanes], int64_t begin, int64_t count,
                                 Place place) {
  for (int64_t first = 0; first < count; first += kFloatLanes) {
    Vector<float> square[kFloatLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kFloatLanes; ++i) {
      square[i] = load_first(rows[i] + begin + first, count - first);
    }
    transpose<float>(square);
    const int64_t left = count - first < kFloatLanes ? count - first : kFloatLanes;
    for (int64_t i = 0; i < left; ++i) store(place(first + i), square[i]);
  }
}

// [9 taps][padded input channels] vectors over kFloatLanes output channels from `channel` on; in
// place of channels behind the last one, that one again.
template <typename Entry, typename W>
static void unpack_taps(const Conv3x3Params& params, const Conv3x3Channels<Entry>& channels,
                        int64_t channel, float* taps) {
  const W* rows[kFloatLanes];
  for (int64_t i = 0; i < kFloatLanes; ++i) {
    const int64_t last = params.out_channels - 1, row = channel + i < last ? channel + i : last;
    rows[i] = static_cast<const W*>(params.weight) + row * 9 * params.in_channels;
  }
  const int64_t tap_size = channels.padded() * kFloatLanes;
  for (int64_t tap = 0; tap < 9; ++tap) {
    float* const tap_channels = taps + tap * tap_size;
    if (params.channel_stride == 1) {
      transpose_run(rows, tap * params.tap_stride + channels.first, channels.count,
                    [=](int64_t i) { return tap_channels + i * kFloatLanes; });
    }
    if (channels.padded() > channels.count) {
      store(tap_channels + channels.count * kFloatLanes, Vector<float>{});
    }
  }
  if (params.channel_stride != 1) {
    transpose_run(rows, channels.first * 9, channels.count * 9,
                  [=](int64_t i) { return taps + i % 9 * tap_size + i / 9 * kFloatLanes; });
  }
}

// `entries` vectors of entries, kConvColumns apart: sums over kTaps taps of the numbers of a
// channel and, in pairs, of the next.
template <typename Entry, typename W, int kTaps>
static void sum_taps(const float* const (&taps)[4], int64_t entries, float* place) {
  const auto of_channel = [&](int64_t c) __attribute__((always_inline)) {
    Vector<float> sum = load(taps[0] + c * kFloatLanes);
#pragma GCC unroll 4
    for (int i = 1; i < kTaps; ++i) sum += load(taps[i] + c * kFloatLanes);
    return sum;
  };
  for (int64_t k = 0; k < entries; ++k, place += kConvColumns) {
#ifdef __AVX512BF16__
    if constexpr (kElementsPerEntry<Entry> == 2) {
      const auto bits_of_channel = [&](int64_t c) __attribute__((always_inline)) {
        if constexpr (kTaps == 1 && __is_same(W, Bfloat16)) return (Bits32)of_channel(c) >> 16;
        // Denormal numbers become zero, as they do in the products of bfloat16.
        const __m256bh narrow = _mm512_cvtneps_pbh((__m512)of_channel(c));
        return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)narrow);
      };
      store(place, (Vector<float>)(bits_of_channel(2 * k) | bits_of_channel(2 * k + 1) << 16));
      continue;
    }
#endif
    store(place, of_channel(k));
  }
}

// [phases][side][side * entries][kConvColumns]: what each row of a phase's taps multiplies by.
template <typename Entry, typename W>
static void pack_panel(const Conv3x3Params& params, const Conv3x3Product& product,
                       const Conv3x3Channels<Entry>& channels, int64_t channel, float* panel,
                       float* taps) {
  const int64_t columns = conv3x3_channels(params, channel), entries = channels.entries;
  const int64_t tap_size = channels.padded() * kFloatLanes;
  for (int64_t n = 0; n < columns; n += kFloatLanes) {
    unpack_taps<Entry, W>(params, channels, channel + n, taps);
    float* place = panel + n;
    for (int64_t phase = 0; phase < product.phases; ++phase) {
      for (int64_t tap = 0; tap < product.side * product.side; ++tap) {
        const int64_t i = tap / product.side, j = tap % product.side;
        const bool folds = product.phases > 1;
        const FoldedTaps down = folds ? folded_taps(phase / 2, i) : FoldedTaps{i, i + 1};
        const FoldedTaps right = folds ? folded_taps(phase % 2, j) : FoldedTaps{j, j + 1};
        const float* summed[4];
        int count = 0;
        for (int64_t y = down.begin; y < down.end; ++y) {
          for (int64_t x = right.begin; x < right.end; ++x) {
            summed[count++] = taps + (3 * y + x) * tap_size;
          }
        }
        const auto sum = count == 1   ? &sum_taps<Entry, W, 1>
                         : count == 2 ? &sum_taps<Entry, W, 2>
                                      : &sum_taps<Entry, W, 4>;
        sum(summed, entries, place);
        place += entries * kConvColumns;
      }
    }
  }
}

// The same where the columns are the taps of each output channel: [entries][kConvColumns].
template <typename Entry, typename W>
static void pack_tap_columns(const Conv3x3Params& params, const Conv3x3Channels<Entry>& channels,
                             float* panel, float* taps) {
  const int64_t tap_size = channels.padded() * kFloatLanes;
  for (int64_t n = 0; n < params.out_channels; n += kFloatLanes) {
    unpack_taps<Entry, W>(params, channels, n, taps);
    const int64_t count = params.out_channels - n;
    for (int64_t tap = 0; tap < 9; ++tap) {
      float* const first = taps + tap * tap_size;
      for (int64_t k = 0; k < channels.entries; ++k) {
        alignas(64) float entry[kConvColumns];
        sum_taps<Entry, W, 1>({first + k * kElementsPerEntry<Entry> * kFloatLanes}, 1, entry);
        store_first(panel + k * kConvColumns + tap * params.out_channels + n, load(entry), count);
      }
    }
  }
}

template <typename Entry, typename W>
static void pack_weight(const Conv3x3Params& params, const Conv3x3Product& product,
                        const Conv3x3Channels<Entry>& channels, int64_t channel, float* panel,
                        float* taps) {
  has_taps_as_columns(params)
      ? pack_tap_columns<Entry, W>(params, channels, panel, taps)
      : pack_panel<Entry, W>(params, product, channels, channel, panel, taps);
}

}  // namespace flexvar::FLEXVAR_ISA
