#include "conv3x3/cpu_kernel.h"

#include "common/cpu_entry.h"
#include "conv3x3/cpu_plain.h"
#include "conv3x3/cpu_weight.h"
#include "conv3x3/cpu_winograd.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

// What a block sees of x: [blocks of channels][map_rows][map_columns][entries of a block].
template <typename T>
void pack_map(const Conv3x3Params& params, const Conv3x3Block& block, const Conv3x3Product& product,
              float* map) {
  using Entry = typename EntryOf<T>::Type;
  constexpr int64_t per_entry = kElementsPerEntry<Entry>, step = kFloatLanes * per_entry;
  const int64_t first_row = block.row * params.stride - params.padding;
  const int64_t first_column = block.column * params.stride - params.padding;
  const int64_t pixels = product.map_rows * product.map_columns;
  for (int64_t at = 0; at < pixels; ++at) {
    const int64_t row = first_row + at / product.map_columns;
    const int64_t column = first_column + at % product.map_columns;
    const bool is_inside = row >= 0 && row < params.height && column >= 0 && column < params.width;
    const T* const pixel =
        static_cast<const T*>(params.x) +
        ((block.image * params.height + row) * params.width + column) * params.in_channels;
    float* block_map = map;
    for (int64_t first = 0; first < params.in_channels;) {
      const Conv3x3Channels<Entry> channels(params, product, first);
      float* const place = block_map + at * channels.entries;
      // Vectors may end behind the entries of the last block, where the next pixel comes to stand.
      for (int64_t c = 0; c < channels.count; c += step) {
        store(place + c / per_entry,
              is_inside ? load_entries<Entry>(pixel + first + c, channels.count - c)
                        : Vector<float>{});
      }
      block_map += pixels * channels.entries;
      first = channels.end();
    }
  }
}

// [phases][rows][columns][kConvColumns] of a product.
template <typename T, typename W>
void sum_products(const Conv3x3Params& params, const Conv3x3Block& block,
                  const Conv3x3Product& product, const float* map, const float* panels,
                  float* panel, float* taps, float* sums) {
  using Entry = typename EntryOf<T>::Type;
  const int64_t channel_size = conv3x3_channel_panel_size(product);
  const int64_t columns = has_taps_as_columns(params) ? 9 * params.out_channels
                                                      : conv3x3_channels(params, block.channel);
  const int64_t vectors = (columns + kFloatLanes - 1) / kFloatLanes;
  for (int64_t first = 0; first < params.in_channels;) {
    const Conv3x3Channels<Entry> channels(params, product, first);
    const int64_t entries = channels.entries, depth = product.side * entries;
    const float* right = panel;
    if (panels != nullptr) {
      right = panels + (block.channel / kConvColumns * params.in_channels + first) * channel_size;
    } else {
      pack_weight<Entry, W>(params, product, channels, block.channel, panel, taps);
    }
    for (int64_t phase = 0; phase < product.phases; ++phase) {
      float* const phase_sums = sums + phase * product.rows * product.columns * kConvColumns;
      for (int64_t row = 0; row < product.rows; ++row) {
        const int64_t seen = row * product.stride + phase / 2;
        const float* const left = map + (seen * product.map_columns + phase % 2) * entries;
        const Runs<const Entry> pixels{reinterpret_cast<const Entry*>(left),
                                       product.stride * entries, depth,
                                       product.map_columns * entries};
        multiply_left<Runs<const Entry>, float>(
            pixels, {right, kConvColumns},
            {phase_sums + row * product.columns * kConvColumns, kConvColumns}, product.columns,
            vectors, product.side * depth, first > 0);
      }
      right += product.side * depth * kConvColumns;
    }
    map += product.map_rows * product.map_columns * entries;
    first = channels.end();
  }
}

// Where a pixel of the grid stands in the output.
struct OutputPixel {
  int64_t y, x, place;
  OutputPixel(const Conv3x3Params& params, const Conv3x3Block& block, int64_t phase, int64_t row,
              int64_t column) {
    const int64_t scale = params.phases > 1 ? 2 : 1;
    y = (block.row + row) * scale + phase / 2;
    x = (block.column + column) * scale + phase % 2;
    place = ((block.image * params.out_height + y) * params.out_width + x) * params.out_channels;
  }
};

// Calls visit(phase, row, column, sums of the pixel).
template <typename Visit>
inline __attribute__((always_inline)) void for_each_pixel(const Conv3x3Params& params,
                                                          const Conv3x3Block& block, float* sums,
                                                          Visit visit) {
  for (int64_t phase = 0; phase < params.phases; ++phase) {
    for (int64_t row = 0; row < block.rows; ++row) {
      for (int64_t column = 0; column < block.columns; ++column, sums += kConvColumns) {
        visit(phase, row, column, sums);
      }
    }
  }
}

// Sums of taps may be finite, or of another sign, where the taps times infinity were not.
template <typename T, typename W>
void mend_sums(const Conv3x3Params& params, const Conv3x3Block& block, int64_t columns,
               float* sums) {
  Vector<float> difference{};
  for_each_pixel(params, block, sums,
                 [&](int64_t, int64_t, int64_t, const float* pixel_sums)
                     __attribute__((always_inline)) {
                       for (int64_t n = 0; n < columns; n += kFloatLanes) {
                         const Vector<float> sum = load(pixel_sums + n);
                         difference += sum - sum;
                       }
                     });
  bool all_finite = true;
  for (int64_t i = 0; i < kFloatLanes; ++i) all_finite &= difference[i] == 0;
  if (all_finite) return;
  for_each_pixel(
      params, block, sums, [&](int64_t phase, int64_t row, int64_t column, float* pixel_sums) {
        const OutputPixel pixel(params, block, phase, row, column);
        for (int64_t n = 0; n < columns; ++n) {
          if (pixel_sums[n] - pixel_sums[n] == 0) continue;
          pixel_sums[n] =
              convolve_plainly<T, W>(params, block.image, pixel.y, pixel.x, block.channel + n);
        }
      });
}

// Adds up the taps of all channels, in place.
void add_taps(const Conv3x3Params& params, const Conv3x3Block& block, const Conv3x3Product& product,
              float* sums) {
  const int64_t channels = params.out_channels, line = product.map_columns * kConvColumns;
  for_each_pixel(params, block, sums, [&](int64_t, int64_t row, int64_t column, float* out) {
    const float* const taps = sums + row * line + column * kConvColumns;
    for (int64_t n = 0; n < channels; n += kFloatLanes) {
      Vector<float> total{};
#pragma GCC unroll 9
      for (int64_t tap = 0; tap < 9; ++tap) {
        total += load(taps + tap / 3 * line + tap % 3 * kConvColumns + tap * channels + n);
      }
      store(out + n, total);
    }
  });
}

template <typename T>
void finish_block(const Conv3x3Params& params, const Conv3x3Block& block, int64_t columns,
                  float* sums) {
  for_each_pixel(params, block, sums,
                 [&](int64_t phase, int64_t row, int64_t column, const float* pixel_sums) {
                   const OutputPixel pixel(params, block, phase, row, column);
                   for (int64_t n = 0; n < columns; n += kFloatLanes) {
                     const int64_t channel = block.channel + n, count = columns - n;
                     const int64_t place = pixel.place + channel;
                     Vector<float> sum = load(pixel_sums + n);
                     if (params.bias) sum += load_first(params.bias + channel, count);
                     if (params.residual) {
                       sum += load_first(static_cast<const T*>(params.residual) + place, count);
                     }
                     store_first(static_cast<T*>(params.out) + place, sum, count);
                   }
                 });
}

template <typename T, typename W>
void convolve_block(const Conv3x3Params& params, const Conv3x3Block& block, const float* panels,
                    bool is_packed, float* map) {
  const Conv3x3Product product = conv3x3_product(params, block.rows, block.columns);
  float* const panel = map + conv3x3_map_size(params, product);
  float* const taps = panel + conv3x3_panel_size(product);
  float* const sums = taps + conv3x3_taps_size(product);
  const int64_t channels = conv3x3_channels(params, block.channel);
  if (!is_packed) pack_map<T>(params, block, product, map);
  sum_products<T, W>(params, block, product, map, panels, panel, taps, sums);
  if (has_taps_as_columns(params)) add_taps(params, block, product, sums);
  if (params.phases > 1) mend_sums<T, W>(params, block, channels, sums);
  finish_block<T>(params, block, channels, sums);
}

template <typename T, typename W>
void pack_channels(const Conv3x3Params& params, int64_t channel, int64_t begin, int64_t end,
                   float* panels, float* taps) {
  const Conv3x3Product product = conv3x3_product(params, 1, 1);
  const int64_t place = channel / kConvColumns * params.in_channels;
  while (begin < end) {
    const Conv3x3Channels<typename EntryOf<T>::Type> channels(params, product, begin);
    pack_weight<typename EntryOf<T>::Type, W>(
        params, product, channels, channel,
        panels + (place + begin) * conv3x3_channel_panel_size(product), taps);
    begin = channels.end();
  }
}

// Calls `function` with values of the types of x and of the weight.
template <typename Function>
void with_elements(const Conv3x3Params& params, Function function) {
  if (params.element == FloatElement::float32) return function(float{}, float{});
  params.weight_element == FloatElement::float32 ? function(Bfloat16{}, float{})
                                                 : function(Bfloat16{}, Bfloat16{});
}

}  // namespace

void conv3x3_pack(const Conv3x3Params& params, int64_t channel, int64_t begin, int64_t end,
                  float* panels, float* taps) {
  with_elements(params, [&](auto x, auto weight) {
    pack_channels<decltype(x), decltype(weight)>(params, channel, begin, end, panels, taps);
  });
}

void conv3x3_block(const Conv3x3Params& params, const Conv3x3Block& block, const float* panels,
                   bool is_packed, float* scratch) {
  with_elements(params, [&](auto x, auto weight) {
    convolve_block<decltype(x), decltype(weight)>(params, block, panels, is_packed, scratch);
  });
}

void winograd_pack(const Conv3x3Params& params, int64_t channel, int64_t begin, int64_t end,
                   float* panels, float* taps) {
  const Winograd& sizes = winograd_of(params);
  const int64_t step =
      channel / kConvColumns * sizes.channel_steps(params.in_channels) + begin / kWinogradChannels;
  with_elements(params, [&](auto x, auto weight) {
    winograd::transform_weight<decltype(x), decltype(weight)>(
        params, channel, begin, end - begin, panels + step * sizes.panel_size(), taps);
  });
}

void winograd_block(const Conv3x3Params& params, const WinogradBlock& block, const float* panels,
                    bool is_packed, float* scratch) {
  with_elements(params, [&](auto x, auto weight) {
    const int64_t outputs = winograd_of(params).outputs;
    const auto redo = [&](int64_t row, int64_t column, float* rest) {
      const int64_t rows = params.height - row, columns = params.width - column;
      convolve_block<decltype(x), decltype(weight)>(
          params,
          {block.image, row, column, rows < outputs ? rows : outputs,
           columns < outputs ? columns : outputs, block.channel},
          nullptr, false, rest);
    };
    winograd::convolve<decltype(x), decltype(weight)>(params, block, panels, is_packed, scratch,
                                                      redo);
  });
}

}  // namespace flexvar::FLEXVAR_ISA
