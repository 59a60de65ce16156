// Rows of latents from images: every token of a pyramid of scales, resampled. Products are exact in
// double precision and sums have a fixed order: areas and nearest pixels are the same bits as on
// the CPU.
#pragma once

#include "common/divide_up.h"
#include "common/ptx.cuh"
#include "resample/weights.h"

namespace flexvar {

// Scales of a pyramid that one launch handles; the launcher goes through more in several.
constexpr int kVqMaxScales = 32;

struct VqScaleSize {
  int64_t first_token;
  int height, width;
};

struct VqResampleParams {
  const float* images;  // [B, C, height, width]
  float* rows;          // [B, tokens, C]
  ResampleMode mode;
  int num_images, channels, height, width;
  int64_t tokens;  // of one image, all scales together
  int num_scales;
  VqScaleSize scales[kVqMaxScales];  // consecutive ones
  int64_t first_token, end_token;    // that they cover
};

constexpr int kVqResampleThreads = 128;
constexpr int kVqResampleTokens = 32;     // of a block: a lane has one
constexpr int kVqWindowColumns = 16;      // whose weights are there at a time
constexpr int kVqPixelsAtATime = 16;      // that a thread loads, of all its channels
constexpr int kVqWarpsOfChannels = 16;    // that a multiprocessor needs to be busy
constexpr int kVqChannelsOfManyRows = 4;  // of a thread: so many share windows and weights

__host__ __device__ constexpr int vq_resample_channels(int of_thread) {
  return kVqResampleThreads / kVqResampleTokens * of_thread;
}

// Each thread's own: in registers they could not be indexed.
struct VqResampleStorage {
  float weights[kVqWindowColumns][kVqResampleThreads];
};

// A lane has a token, a warp kChannels channels. A sum's terms are added one after the other, so
// what the longest window takes is their latency: the next pixels are on their way meanwhile, and
// blocks of the first tokens, which have the longest windows, come first.
template <int kChannels>
__global__ void __launch_bounds__(kVqResampleThreads, 3)
    vq_resample_kernel(VqResampleParams params) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  constexpr int kColumns = kVqPixelsAtATime / kChannels;
  static_assert(kVqWindowColumns % kColumns == 0);
  auto& shared = shared_storage<VqResampleStorage>();
  const auto lane = static_cast<int>(threadIdx.x % kVqResampleTokens);
  const unsigned warp = threadIdx.x / kVqResampleTokens;
  constexpr unsigned kBlockChannels = vq_resample_channels(kChannels);
  const unsigned channel_blocks = (params.channels + kBlockChannels - 1) / kBlockChannels;
  const unsigned image_block = blockIdx.x / channel_blocks;
  const unsigned channel = blockIdx.x % channel_blocks * kBlockChannels + warp * kChannels;
  const int64_t image = image_block % static_cast<unsigned>(params.num_images);
  const int64_t token =
      params.first_token + lane +
      int64_t{image_block / static_cast<unsigned>(params.num_images)} * kVqResampleTokens;
  if (token >= params.end_token || channel >= static_cast<unsigned>(params.channels)) {
    return;
  }

  int number = 0;
  while (number + 1 < params.num_scales && params.scales[number + 1].first_token <= token) ++number;
  const VqScaleSize scale = params.scales[number];
  const int64_t place = token - scale.first_token;
  const auto row_axis = make_resample_axis<float>(params.mode, params.height, scale.height);
  const auto column_axis = make_resample_axis<float>(params.mode, params.width, scale.width);
  const auto row_window = resample_window(row_axis, place / scale.width);
  const auto column_window = resample_window(column_axis, place % scale.width);
  const auto window_rows = static_cast<int>(row_window.count);
  const auto window_columns = static_cast<int>(column_window.count);
  const int64_t plane = int64_t{params.height} * params.width;
  const float* const corner = params.images + (image * params.channels + channel) * plane +
                              row_window.start * params.width + column_window.start;

  float pixels[kColumns][kChannels], next_pixels[kColumns][kChannels];
  const auto load = [&](float (&to)[kColumns][kChannels], int row, int column) {
    const float* from = corner + int64_t{row} * params.width + column;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        to[j][k] = column + j < window_columns ? from[j] : 0.0f;
      }
      from += plane;
    }
  };
  load(pixels, 0, 0);

  // Where all weights are the same, they are made once.
  const bool equal = params.mode == ResampleMode::area || params.mode == ResampleMode::nearest;
  float* const column_weights = &shared.weights[0][threadIdx.x];
  float row_weight = 0;
  double weights[kColumns], sums[kChannels] = {};
  int row = 0, column = 0;
  bool weigh = true;
#pragma unroll 1
  while (true) {
    int next_row = row, next_column = column + kColumns;
    if (next_column >= window_columns) {
      next_column = 0;
      ++next_row;
    }
    const bool more = next_row < window_rows;
    if (more) load(next_pixels, next_row, next_column);
    if (weigh) {
      if (column == 0) row_weight = resample_weight(row_axis, row_window, row);
      const int first = column % kVqWindowColumns;
      const int there = equal ? 1 : min(window_columns - column + first, kVqWindowColumns);
      if (first == 0 && (row == 0 || window_columns > kVqWindowColumns)) {
#pragma unroll 1
        for (int j = 0; j < there; ++j) {
          column_weights[j * kVqResampleThreads] =
              resample_weight(column_axis, column_window, column + j);
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        // In fp32, so that products with pixels are exact in double.
        const int of = min(first + j, there - 1);
        weights[j] = static_cast<double>(row_weight * column_weights[of * kVqResampleThreads]);
      }
      weigh = !equal;
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        // Zeros behind the window's last column change nothing: no sum is -0.
        sums[k] += weights[j] * static_cast<double>(pixels[j][k]);
      }
    }
    if (!more) break;
    row = next_row;
    column = next_column;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) pixels[j][k] = next_pixels[j][k];
    }
  }

  float* const out = params.rows + (image * params.tokens + token) * params.channels + channel;
  if constexpr (kChannels == 4) {
    *reinterpret_cast<float4*>(out) =
        make_float4(static_cast<float>(sums[0]), static_cast<float>(sums[1]),
                    static_cast<float>(sums[2]), static_cast<float>(sums[3]));
  } else {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) out[k] = static_cast<float>(sums[k]);
  }
}

// Whether there is work for all multiprocessors with several channels a thread.
inline bool vq_has_many_rows(const VqResampleParams& params, int multiprocessors) {
  const int64_t warps = divide_up(params.end_token - params.first_token, kVqResampleTokens) *
                        params.num_images * (params.channels / kVqChannelsOfManyRows);
  return params.channels % kVqChannelsOfManyRows == 0 &&
         warps >= int64_t{kVqWarpsOfChannels} * multiprocessors;
}

inline int64_t vq_resample_blocks(const VqResampleParams& params, int channels_of_thread) {
  return divide_up(params.end_token - params.first_token, kVqResampleTokens) * params.num_images *
         divide_up(params.channels, vq_resample_channels(channels_of_thread));
}

}  // namespace flexvar
