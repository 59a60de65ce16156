// One sum by the definition, for sums that a quicker way gave as no finite number though they may
// be one, or another infinity.
#pragma once

#include "common/cpu_element.h"
#include "conv3x3/cpu_params.h"

namespace flexvar::FLEXVAR_ISA {

template <typename T, typename W>
static float convolve_plainly(const Conv3x3Params& params, int64_t image, int64_t y, int64_t x,
                              int64_t channel) {
  const bool up = params.resize == ConvResize::up;
  const int64_t height = up ? 2 * params.height : params.height;
  const int64_t width = up ? 2 * params.width : params.width;
  const W* const weight = static_cast<const W*>(params.weight) + channel * params.in_channels * 9;
  const T* const x_map = static_cast<const T*>(params.x);
  float sum = 0;
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t row = y * params.stride + tap / 3 - params.padding;
    const int64_t column = x * params.stride + tap % 3 - params.padding;
    const bool is_inside = row >= 0 && row < height && column >= 0 && column < width;
    const int64_t pixel =
        (image * params.height + (up ? row / 2 : row)) * params.width + (up ? column / 2 : column);
    for (int64_t c = 0; c < params.in_channels; ++c) {
      // The zeros around the map count: times infinity they are NaN.
      sum += (is_inside ? to_float(x_map[pixel * params.in_channels + c]) : 0.0f) *
             to_float(weight[c * params.channel_stride + tap * params.tap_stride]);
    }
  }
  return sum;
}

}  // namespace flexvar::FLEXVAR_ISA
