#include "conv3x3/cpu_amx.h"

#include "common/cpu_amx.h"
#include "conv3x3/cpu_plain.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

template <typename T>
constexpr int kPartsOf = __is_same(T, Bfloat16) ? 1 : 3;

// What a band sees of x.
template <typename T>
void pack_band(const ConvTileParams& params, const Conv3x3Band& band, const ConvTileBlock& block,
               char* place) {
  constexpr int parts = kPartsOf<T>;
  const int64_t part_bytes = band.part_bytes(params), columns = band.seen_columns(params);
  const int64_t first_row = block.row * params.stride - params.padding;
  const int64_t first_column = block.tile * kTileRows * params.stride - params.padding;
  for (int64_t first = 0; first < params.in_channels; first += kTileDepth) {
    const int64_t channels = params.in_channels - first;
    char* pixel_place = place + first / kTileDepth * parts * part_bytes;
    for (int64_t i = 0; i < band.seen_rows(params); ++i) {
      const int64_t row = first_row + i;
      const bool is_inside = row >= 0 && row < params.height;
      const T* const line =
          static_cast<const T*>(params.x) +
          (block.image * params.height + row) * params.width * params.in_channels + first;
      for (int64_t j = 0; j < columns; ++j, pixel_place += 64) {
        const int64_t column = first_column + j;
        TileVectors<parts> vectors{};
        if (is_inside && column >= 0 && column < params.width) {
          const T* const pixel = line + column * params.in_channels;
          vectors = channels >= kTileDepth ? load_tile_vectors<parts>(pixel)
                                           : load_last_tile_vectors<parts>(pixel, channels);
        }
#pragma GCC unroll 3
        for (int part = 0; part < parts; ++part) {
          _mm512_store_si512(pixel_place + part * part_bytes, vectors.part[part]);
        }
      }
    }
  }
}

// The taps of 32 input channels of an output channel.
using Taps = float[3][3][kTileDepth];

// Tap (a, b) of a phase.
void fold(const Taps& taps, int64_t phase, int64_t a, int64_t b, float* sum) {
  const FoldedTaps rows = folded_taps(phase / 2, a), columns = folded_taps(phase % 2, b);
  for (int64_t c = 0; c < kTileDepth; c += kFloatLanes) {
    Vector<float> total{};
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t j = columns.begin; j < columns.end; ++j) total += load(taps[i][j] + c);
    }
    store(sum + c, total);
  }
}

template <int kParts, typename W>
void pack_weight(const ConvTileParams& params, int64_t unit_begin, int64_t unit_end) {
  const int64_t blocks = params.channel_blocks();
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t tile = unit / blocks, block = unit % blocks;
    const int64_t first = block * kTileDepth, columns = params.out_channels - tile * kTileRows;
    const int64_t left = params.in_channels - first;
    const int64_t channels = left < kTileDepth ? left : kTileDepth;
    alignas(64) Taps taps[kTileRows] = {};
    for (int64_t i = 0; i < kTileRows && i < columns; ++i) {
      const W* weight = static_cast<const W*>(params.weight) +
                        (tile * kTileRows + i) * params.in_channels * 9 +
                        first * params.channel_stride;
      if (params.channel_stride == 1) {
        for (int64_t tap = 0; tap < 9; ++tap, weight += params.tap_stride) {
          for (int64_t c = 0; c < channels; c += kFloatLanes) {
            store(taps[i][tap / 3][tap % 3] + c, load_first(weight + c, channels - c));
          }
        }
        continue;
      }
      for (int64_t c = 0; c < channels; ++c, weight += params.channel_stride) {
#pragma GCC unroll 9
        for (int64_t tap = 0; tap < 9; ++tap)
          taps[i][tap / 3][tap % 3][c] = to_float(weight[tap * params.tap_stride]);
      }
    }
    for (int64_t phase = 0; phase < params.phases; ++phase) {
      char* panel =
          params.weight_panels +
          ((phase * params.column_tiles() + tile) * blocks + block) * params.weight_block_bytes();
      for (int64_t tap = 0; tap < params.taps(); ++tap, panel += kParts * kTileBytes) {
        if (params.phases == 1) {
          pack_right_panel<kParts>(panel, taps[0][tap / 3][tap % 3], 9 * kTileDepth, kTileRows,
                                   kTileDepth);
        } else {
          alignas(64) float folded[kTileRows][kTileDepth];
          for (int64_t i = 0; i < kTileRows; ++i) fold(taps[i], phase, tap / 2, tap % 2, folded[i]);
          pack_right_panel<kParts>(panel, folded[0], kTileDepth, kTileRows, kTileDepth);
        }
      }
    }
  }
}

// Some tiles of a band, of a phase, and their columns.
struct Part {
  int64_t phase, tile_begin, tile_end, column_tile_begin, column_tile_end;
};

// Sums that are not those of the definition, maybe: a part of a factor may have been infinite, or
// infinity less infinity, where it was not, and a sum of taps finite, or of another sign, where the
// taps times infinity were not.
template <typename T>
unsigned doubtful_lanes(const ConvTileParams& params, Vector<float> sum) {
  const Vector<float> tested = params.phases > 1 ? sum - sum : sum;
  if (kPartsOf<T> == 1 && params.phases == 1) return 0;
  return _mm512_cmp_ps_mask((__m512)tested, (__m512)tested, _CMP_UNORD_Q);
}

template <typename T, typename W>
void finish_part(const ConvTileParams& params, const Conv3x3Band& band, const ConvTileBlock& block,
                 const Part& part, const float* sums) {
  const int64_t scale = params.resize == ConvResize::up ? 2 : 1;
  const int64_t columns = part.column_tile_end - part.column_tile_begin;
  for (int64_t tile = part.tile_begin; tile < part.tile_end; ++tile, sums += columns * 256) {
    const int64_t grid_row = block.row + tile / band.tiles;
    const int64_t first = (block.tile + tile % band.tiles) * kTileRows;
    if (grid_row >= params.grid_height) break;
    const int64_t y = grid_row * scale + part.phase / 2;
    for (int64_t j = 0; j < kTileRows && first + j < params.grid_width; ++j) {
      const int64_t x = (first + j) * scale + part.phase % 2;
      const int64_t place =
          ((block.image * params.out_height + y) * params.out_width + x) * params.out_channels;
      for (int64_t n = 0; n < columns; ++n) {
        const int64_t channel = (part.column_tile_begin + n) * kTileRows;
        const int64_t count = params.out_channels - channel;
        Vector<float> sum = load(sums + n * 256 + j * kTileRows);
        for (unsigned lanes = doubtful_lanes<T>(params, sum); lanes != 0; lanes &= lanes - 1) {
          const int64_t lane = __builtin_ctz(lanes);
          if (lane < count) {
            sum[lane] = convolve_plainly<T, W>(params, block.image, y, x, channel + lane);
          }
        }
        if (params.bias) sum += load_first(params.bias + channel, count);
        if (params.residual) {
          sum += load_first(static_cast<const T*>(params.residual) + place + channel, count);
        }
        store_result(static_cast<T*>(params.out) + place + channel, sum, count);
      }
    }
  }
}

template <typename T, typename W>
void convolve_part(const ConvTileParams& params, const Conv3x3Band& band,
                   const ConvTileBlock& block, const Part& part, const char* x, float* sums) {
  constexpr int parts = kPartsOf<T>;
  const int64_t blocks = params.channel_blocks(), line = band.seen_columns(params) * 64;
  const int64_t columns = part.column_tile_end - part.column_tile_begin;
  const int64_t tiles = part.tile_end - part.tile_begin;
  const int64_t block_bytes = parts * band.part_bytes(params), taps = params.taps();
  // Blocks of channels that a product takes at a time: in float32 one chain of sums.
  const int64_t group = (parts == 1 ? 18 : 9) / taps;
  int64_t steps[18];
  for (int64_t tap = 0; tap < taps; ++tap) {
    steps[tap] = params.phases == 1
                     ? tap / 3 * line + tap % 3 * 64
                     : (tap / 2 + part.phase / 2) * line + (tap % 2 + part.phase % 2) * 64;
  }
  for (int64_t i = taps; i < group * taps; ++i) steps[i] = steps[i - taps] + block_bytes;
  const auto offset = [&](int64_t i) {
    const int64_t tile = part.tile_begin + i;
    return (tile / band.tiles * line + tile % band.tiles * kTileRows * 64) * params.stride;
  };
  for (int64_t c = 0; c < blocks; c += group, x += group * block_bytes) {
    const int64_t num_steps = (blocks - c < group ? blocks - c : group) * taps;
    for (int64_t n = 0; n < columns; n += 2) {
      const char* const panel =
          params.weight_panels +
          ((part.phase * params.column_tiles() + part.column_tile_begin + n) * blocks + c) *
              params.weight_block_bytes();
      const char* const right[2] = {panel, panel + blocks * params.weight_block_bytes()};
      for (int64_t i = 0; i < tiles; i += 2) {
        // Behind the last tile the last one again, for sums that nobody reads.
        const bool is_pair = i + 1 < tiles;
        alignas(64) float spare[2][256];
        const LeftTiles left{{x + offset(i), x + offset(is_pair ? i + 1 : i)},
                             steps,
                             band.part_bytes(params),
                             params.stride * 64};
        float* const first = sums + (i * columns + n) * 256;
        float* const second = is_pair ? first + columns * 256 : spare[0];
        float* const out[2][2] = {{first, first + 256},
                                  {second, is_pair ? second + 256 : spare[1]}};
        if (n + 1 < columns) {
          multiply_tiles<parts, 2>(left, right, out, num_steps, c > 0);
        } else {
          multiply_tiles<parts, 1>(left, right, out, num_steps, c > 0);
        }
      }
    }
  }
  finish_part<T, W>(params, band, block, part, sums);
}

template <typename T, typename W>
void convolve_block(const ConvTileParams& params, const Conv3x3Band& band,
                    const ConvTileBlock& block, bool is_packed, char* scratch) {
  if (!is_packed) pack_band<T>(params, band, block, scratch);
  float* const sums = reinterpret_cast<float*>(scratch + band.bytes(params));
  const int64_t tiles = band.rows * band.tiles;
  for (Part part{}; part.phase < params.phases; ++part.phase) {
    for (int64_t n = block.column_tile_begin; n < block.column_tile_end; n += kConvColumnTiles) {
      part.column_tile_begin = n;
      part.column_tile_end = n + kConvColumnTiles < block.column_tile_end ? n + kConvColumnTiles
                                                                          : block.column_tile_end;
      for (int64_t i = 0; i < tiles; i += kConvTiles) {
        part.tile_begin = i;
        part.tile_end = i + kConvTiles < tiles ? i + kConvTiles : tiles;
        convolve_part<T, W>(params, band, block, part, scratch, sums);
      }
    }
  }
}

}  // namespace

Conv3x3Band::Conv3x3Band(const ConvTileParams& params, int64_t count) {
  constexpr int64_t kMostBytes = 1 << 20, kMostTiles = 4, kFewestRows = 8;
  const int64_t height = params.grid_height;
  tiles = params.tiles_in_row() < kMostTiles ? params.tiles_in_row() : kMostTiles;
  const int64_t wanted = (height + count - 1) / count;
  const int64_t most = wanted > kFewestRows ? wanted : kFewestRows;
  rows = 1;
  while (rows < height && rows < most) {
    ++rows;
    if (bytes(params) > kMostBytes) {
      --rows;
      break;
    }
  }
  const int64_t bands = (height + rows - 1) / rows;
  rows = (height + bands - 1) / bands;  // alike
}

void conv3x3_pack_weight(const ConvTileParams& params, int64_t unit_begin, int64_t unit_end) {
  if (params.element == FloatElement::float32) {
    return pack_weight<3, float>(params, unit_begin, unit_end);
  }
  params.weight_element == FloatElement::float32
      ? pack_weight<1, float>(params, unit_begin, unit_end)
      : pack_weight<1, Bfloat16>(params, unit_begin, unit_end);
}

void conv3x3_block(const ConvTileParams& params, const Conv3x3Band& band,
                   const ConvTileBlock& block, bool is_packed, char* scratch) {
  const TileScope scope;
  if (params.element == FloatElement::float32) {
    return convolve_block<float, float>(params, band, block, is_packed, scratch);
  }
  params.weight_element == FloatElement::float32
      ? convolve_block<Bfloat16, float>(params, band, block, is_packed, scratch)
      : convolve_block<Bfloat16, Bfloat16>(params, band, block, is_packed, scratch);
}

}  // namespace flexvar::FLEXVAR_ISA
