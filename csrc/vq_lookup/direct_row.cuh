// Rows of latents and codes as the direct kernels read them: from the arguments themselves, which
// nobody has normalised before.
#pragma once

#include "vq_lookup/exact_row.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

// Rows that begin at a multiple of 16 bytes.
struct VqDirectRows {
  const float* values;
  int count;
  int dim;  // a multiple of 4
};

// Sums of squares outside may have lost digits to overflow or underflow in fp32; and lengths inside
// are above those that F.normalize takes for 1e-12.
constexpr float kVqLeastSquares = 1e-20f;
constexpr float kVqMostSquares = 1e20f;

// A row that four neighbouring lanes share: lane t holds components 4t … 4t + 3 of every 16; zeros
// behind the row's last and the last row.
template <int kSteps>
struct VqQuarterRow {
  float values[kSteps][4];

  __device__ __forceinline__ VqQuarterRow(const VqDirectRows& rows, int row) {
    const int first = static_cast<int>(threadIdx.x % 4) * 4;
    const float* line = rows.values + static_cast<int64_t>(row) * rows.dim + first;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      float4 four = {};
      if (row < rows.count && first + k * 16 < rows.dim) {
        four = *reinterpret_cast<const float4*>(line + k * 16);
      }
      values[k][0] = four.x;
      values[k][1] = four.y;
      values[k][2] = four.z;
      values[k][3] = four.w;
    }
  }

  template <class Real>
  __device__ __forceinline__ Real dot(const VqQuarterRow& other) const {
    Real sum = 0;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum += static_cast<Real>(values[k][i]) * static_cast<Real>(other.values[k][i]);
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
  }
};

__device__ __forceinline__ bool vq_is_regular(float squares) {
  return squares > kVqLeastSquares && squares < kVqMostSquares;
}

}  // namespace flexvar
