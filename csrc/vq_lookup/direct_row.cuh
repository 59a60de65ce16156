// Rows of latents and codes from the arguments themselves, which nobody has normalised before: in
// fp32 for scores, and exactly.
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

  VqQuarterRow() = default;
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

// Normalises rows side by side, and gives |row|²: NaN where it is not finite, and then its
// components are zero.
template <int kSteps, int kRows>
__device__ __forceinline__ void vq_normalize(VqQuarterRow<kSteps> (&rows)[kRows],
                                             const bool (&exist)[kRows], float (&squares)[kRows]) {
  float scales[kRows];
  bool irregular[kRows], any_irregular = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    squares[r] = rows[r].template dot<float>(rows[r]);
    irregular[r] = exist[r] && !vq_is_regular(squares[r]);
    any_irregular |= irregular[r];
    scales[r] = exist[r] ? rsqrtf(squares[r]) : 0.0f;
    squares[r] = 1;
  }
  if (__any_sync(0xffffffffu, any_irregular)) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const double exact = rows[r].template dot<double>(rows[r]);
      const double exact_scale = vq_scale(exact);
      if (!irregular[r]) continue;
      const bool finite = vq_is_finite(exact);
      squares[r] = finite ? static_cast<float>(exact * exact_scale * exact_scale) : NAN;
      scales[r] = 1;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (float& value : rows[r].values[k]) {
          value = finite ? vq_scaled(value, exact_scale) : 0.0f;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (float& value : rows[r].values[k]) value *= scales[r];
    }
  }
}

__device__ __forceinline__ uint32_t vq_half_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <int kSteps>
__device__ __forceinline__ void vq_store_half(__half* line, const VqQuarterRow<kSteps>& row) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const float (&four)[4] = row.values[k];
    *reinterpret_cast<uint2*>(line + k * 16 + threadIdx.x % 4 * 4) =
        make_uint2(vq_half_pair(four[0], four[1]), vq_half_pair(four[2], four[3]));
  }
}

// What a code's scores begin with, from what vq_normalize gives.
__device__ __forceinline__ float vq_start(float squares, bool exists) {
  return exists && !isnan(squares) ? -0.5f * squares : kVqAbsentScore;
}

// Component i of a lane is lane % 8 + 8 i of the row, normalised, as the CPU has it.
template <int kSteps>
struct VqExactRow {
  float values[kSteps * 2];
  double half_norm;  // infinite for a row that is not finite, or not there

  __device__ __forceinline__ VqExactRow(const VqDirectRows& rows, int row) {
    const int first = static_cast<int>(threadIdx.x % kVqLanesPerRow);
    double squares = 0;
#pragma unroll
    for (int i = 0; i < kSteps * 2; ++i) {
      const int c = first + i * kVqLanesPerRow;
      values[i] = row < rows.count && c < rows.dim
                      ? rows.values[static_cast<int64_t>(row) * rows.dim + c]
                      : 0.0f;
      squares += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
    squares = vq_sum_of_row(squares);
    const bool valid = row < rows.count && vq_is_finite(squares);
    const double scale = vq_scale(squares);
    squares = 0;
#pragma unroll
    for (float& value : values) {
      value = valid ? vq_scaled(value, scale) : 0.0f;
      squares += static_cast<double>(value) * static_cast<double>(value);
    }
    squares = vq_sum_of_row(squares);
    half_norm = valid ? 0.5 * squares : static_cast<double>(INFINITY);
  }

  __device__ __forceinline__ double score(const VqExactRow& code) const {
    double dot = 0;
#pragma unroll
    for (int i = 0; i < kSteps * 2; ++i) {
      dot += static_cast<double>(values[i]) * static_cast<double>(code.values[i]);
    }
    return vq_sum_of_row(dot) - code.half_norm;
  }
};

}  // namespace flexvar
