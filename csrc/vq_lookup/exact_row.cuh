// Exact arithmetic on rows: the same bits as on the CPU.
#pragma once

#include "common/cuda.cuh"

namespace flexvar {

// Eight neighbouring lanes share a row; lane j holds components j, j + 8, …. The sum over the lanes
// is ((0+4)+(2+6)) + ((1+5)+(3+7)).
constexpr int kVqLanesPerRow = 8;

__device__ __forceinline__ double vq_sum_of_row(double partial) {
  partial += __shfl_xor_sync(0xffffffffu, partial, 4);
  partial += __shfl_xor_sync(0xffffffffu, partial, 2);
  return partial + __shfl_xor_sync(0xffffffffu, partial, 1);
}

// A sum of squares of finite floats does not overflow in double.
__device__ __forceinline__ bool vq_is_finite(double squares) {
  return squares < static_cast<double>(INFINITY);
}

// What normalises a row.
__device__ __forceinline__ double vq_scale(double squares) {
  const double norm = sqrt(squares);
  return 1.0 / (norm > 1e-12 ? norm : 1e-12);
}

__device__ __forceinline__ float vq_scaled(float component, double scale) {
  return static_cast<float>(static_cast<double>(component) * scale);
}

}  // namespace flexvar
