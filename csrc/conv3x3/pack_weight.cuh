// The weight as conv3x3_kernel reads it: the taps of each phase, rounded to the pixels' type, in
// the order of its copies, with zeros for the channels that fill up tiles.
#pragma once

#include "common/ptx.cuh"
#include "conv3x3/plan.h"

namespace flexvar {

constexpr int kConvPackThreads = 256;

template <class From, class T>
struct Conv3x3PackParams {
  Conv3x3Plan plan;
  const From* weight;  // [N, C, 3, 3] at these strides
  int64_t column_stride, channel_stride, row_stride, tap_stride;
  const float* bias;     // [N], or null
  const T* narrow_bias;  // the same, where it is of the pixels' type
  T* packed;             // plan.weight_elements()
  float* packed_bias;    // plan.padded_columns()
};

inline int64_t conv3x3_pack_blocks(const Conv3x3Plan& plan) {
  const int64_t threads = int64_t{plan.padded_columns()} * plan.padded_channels;
  return (threads + kConvPackThreads - 1) / kConvPackThreads;
}

// Behind nearest x2, three taps of an output pixel are two on pixels of x: of even ones the first
// and the sum of the others, of odd ones the sum of the first two and the last.
__device__ __forceinline__ void fold_taps(float (&folded)[4], float first, float middle,
                                          float last) {
  folded[0] = first;
  folded[1] = middle + last;
  folded[2] = first + middle;
  folded[3] = last;
}

// A thread packs all taps of one input and one output channel.
template <class From, class T>
__global__ void __launch_bounds__(kConvPackThreads)
    conv3x3_pack_kernel(Conv3x3PackParams<From, T> params) {
  ptx::griddepcontrol_launch_dependents();
  const Conv3x3Plan& plan = params.plan;
  const int64_t thread = blockIdx.x * int64_t{kConvPackThreads} + static_cast<int>(threadIdx.x);
  const int column = static_cast<int>(thread / plan.padded_channels);
  const int channel = static_cast<int>(thread % plan.padded_channels);
  if (column >= plan.padded_columns()) return;

  float taps[3][3];
#pragma unroll
  for (int row = 0; row < 3; ++row) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
      taps[row][tap] = 0;
      if (column < plan.out_channels && channel < plan.in_channels) {
        taps[row][tap] =
            to_float(params.weight[column * params.column_stride + channel * params.channel_stride +
                                   row * params.row_stride + tap * params.tap_stride]);
      }
    }
  }
  const auto store = [&](int phase, int tap, float value) {
    params.packed[plan.weight_place(phase, column, tap, channel)] = from_float<T>(value);
  };
  if (plan.side == 3) {
#pragma unroll
    for (int row = 0; row < 3; ++row) {
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        store(0, row * 3 + tap, taps[row][tap]);
      }
    }
  } else {
    float rows[3][4];
#pragma unroll
    for (int tap = 0; tap < 3; ++tap)
      fold_taps(rows[tap], taps[0][tap], taps[1][tap], taps[2][tap]);
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      float folded[4];
      fold_taps(folded, rows[0][row], rows[1][row], rows[2][row]);
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        store(row / 2 * 2 + tap / 2, row % 2 * 2 + tap % 2, folded[tap]);
      }
    }
  }
  for (int phase = 0; phase < plan.parities * plan.parities; ++phase) {
    for (int tap = plan.side * plan.side;
         tap * plan.padded_channels + channel < plan.depth_steps * plan.step_depth(); ++tap) {
      store(phase, tap, 0);
    }
  }
  if (channel == 0) {
    float bias = 0;
    if (column < plan.out_channels && params.bias != nullptr) bias = params.bias[column];
    if (column < plan.out_channels && params.narrow_bias != nullptr) {
      bias = to_float(params.narrow_bias[column]);
    }
    params.packed_bias[column] = bias;
  }
}

}  // namespace flexvar
