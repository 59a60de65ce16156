// What the CPU kernels of conv3x3 compute, with vectors (cpu_kernel.h) and on the tile unit
// (cpu_amx.h).
#pragma once

#include <stdint.h>

#include "common/float_element.h"
#include "conv3x3/resize.h"

namespace flexvar {

// out = residual + bias + conv(x). The feature maps are channels-last: [batch, height, width, C].
// Upsampling, the output's pixels are of four phases by the parity of their row and column, with
// 2x2 taps each.
struct Conv3x3Params {
  const void* x;
  const void* weight;  // [out_channels], each 9 taps of in_channels at these strides
  int64_t channel_stride, tap_stride;
  const float* bias;     // [out_channels], or null
  const void* residual;  // like out, or null
  void* out;
  FloatElement element, weight_element;  // of x, residual and out; of the weight
  ConvResize resize;
  int64_t batch, height, width, out_height, out_width, in_channels, out_channels;
  int64_t phases, grid_height, grid_width;  // the grid is a phase's pixels
  int64_t side;                             // taps of a phase in a row
  int64_t stride;                           // of the grid in x
  int64_t padding;                          // the pixels of zeros before the first
};

// Nearest x2 and three taps are two taps: even outputs see the input before through the first of
// the three, their own through the sum of the others; odd ones mirrored. The taps [begin, end) that
// tap 0 or 1 of a parity sums:
struct FoldedTaps {
  int64_t begin, end;
};
static inline FoldedTaps folded_taps(int64_t parity, int64_t tap) {
  return tap == 0 ? FoldedTaps{0, 1 + parity} : FoldedTaps{1 + parity, 3};
}

}  // namespace flexvar
