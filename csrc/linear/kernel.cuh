// A linear layer for few rows of x, in 16 bits: what takes time is the way of the weight from
// memory, so the weight is read by many blocks at once, and on its way to the L2 cache before the
// kernel that makes x has ended.
//
// A block multiplies 64 rows of the weight by 64 rows of x over a part of the depth, all of which
// fits into its shared memory. The blocks of a cluster share the depth out; each then adds up some
// rows of the result from the shared memory of all, in the order of the depth.
#pragma once

#include "common/cuda.cuh"
#include "common/ptx.cuh"

namespace flexvar {

constexpr int kLinearCudaThreads = 128;  // a warpgroup
constexpr int kLinearCudaTile = 64;      // rows of the weight, of x, and depth of a step
constexpr int kLinearCudaMostSteps = 13;
constexpr int kLinearCudaMostParts = 8;                     // blocks of a cluster, a power of two
constexpr int kLinearCudaSumsStride = kLinearCudaTile + 4;  // writes meet different banks

template <class T>
struct LinearCudaParams {
  const T* x;       // [rows, depth]
  const T* weight;  // [columns, depth]; depth is a multiple of kLinearCudaTile, columns of 4
  const T* bias;    // [columns], or null
  T* out;           // [rows, columns]
  int rows, columns, depth;
  bool gelu;  // its tanh form
};

template <class T>
using LinearCudaTile = T[kLinearCudaTile][kLinearCudaTile];

// Of a block that takes so many steps of the depth: their tiles, and then sums [row of x][column].
inline size_t linear_cuda_shared_bytes(int steps) {
  const size_t tiles = size_t{2} * steps * sizeof(LinearCudaTile<uint16_t>);
  const size_t sums = sizeof(float) * kLinearCudaTile * kLinearCudaSumsStride;
  return tiles > sums ? tiles : sums;
}

// Starts copying rows [begin, begin + 64) and their 64 elements from `column` on; zeros from row
// `end` on.
template <class T>
__device__ __forceinline__ void linear_copy_tile(LinearCudaTile<T>& tile, const T* matrix,
                                                 int depth, int begin, int end, int column) {
  constexpr int kChunks = kLinearCudaTile / 8, kStep = kLinearCudaThreads / kChunks;
  const int first = static_cast<int>(threadIdx.x) / kChunks;
  const int d = static_cast<int>(threadIdx.x) % kChunks * 8;
#pragma unroll
  for (int row = first; row < kLinearCudaTile; row += kStep) {
    ptx::cp_async<16>(&tile[row][ptx::swizzled_column(row, d)],
                      matrix + int64_t{begin + row} * depth + column + d, begin + row < end);
  }
}

__device__ __forceinline__ float linear_gelu(float x) {
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  return 0.5f * x * (1 + tanhf(kSqrt2OverPi * (x + 0.044715f * x * x * x)));
}

// The grid is (parts of the depth = the cluster, tiles of columns, tiles of rows of x).
template <class T>
__global__ void __launch_bounds__(kLinearCudaThreads)
    linear_few_rows_kernel(LinearCudaParams<T> params) {
  ptx::griddepcontrol_launch_dependents();
  const int thread = static_cast<int>(threadIdx.x);
  const int part = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.x);
  const int column_begin = static_cast<int>(blockIdx.y) * kLinearCudaTile;
  const int row_begin = static_cast<int>(blockIdx.z) * kLinearCudaTile;
  const int all_steps = params.depth / kLinearCudaTile;
  const int first_step = all_steps * part / parts;
  const int steps = all_steps * (part + 1) / parts - first_step;

  // No kernel before this one need have ended for that.
  const T* block_weight =
      params.weight + int64_t{column_begin} * params.depth + int64_t{first_step} * kLinearCudaTile;
  for (int i = thread; i < kLinearCudaTile * steps; i += kLinearCudaThreads) {
    if (column_begin + i / steps >= params.columns) break;
    ptx::prefetch(block_weight + int64_t{i / steps} * params.depth + i % steps * kLinearCudaTile);
  }
  ptx::griddepcontrol_wait();

  LinearCudaTile<T>* const weight = dynamic_shared<LinearCudaTile<T>>();
  LinearCudaTile<T>* const x = weight + steps;
  for (int step = 0; step < steps; ++step) {
    const int column = (first_step + step) * kLinearCudaTile;
    linear_copy_tile(weight[step], params.weight, params.depth, column_begin, params.columns,
                     column);
    linear_copy_tile(x[step], params.x, params.depth, row_begin, params.rows, column);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_for_warpgroup();
  __syncthreads();

  float sums[8][4];
  ptx::warpgroup_begin();
  ptx::warpgroup_multiply<T, false>(sums, weight[0][0], x[0][0], 0);
#pragma unroll
  for (int d = 16; d < kLinearCudaTile; d += 16) {
    ptx::warpgroup_multiply<T, true>(sums, weight[0][0], x[0][0], d);
  }
  for (int step = 1; step < steps; ++step) {
    ptx::warpgroup_begin();
#pragma unroll
    for (int d = 0; d < kLinearCudaTile; d += 16) {
      ptx::warpgroup_multiply<T, true>(sums, weight[step][0], x[step][0], d);
    }
  }
  ptx::warpgroup_end();
  ptx::hold_registers(sums);
  __syncthreads();  // nobody reads the tiles any more

  float* const shared_sums = reinterpret_cast<float*>(weight);
  const int g = thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = n * 8 + 2 * t + i % 2, column = thread / 32 * 16 + g + i / 2 * 8;
      shared_sums[row * kLinearCudaSumsStride + column] = sums[n][i];
    }
  }
  ptx::cluster_barrier();

  constexpr int kVectors = kLinearCudaTile / 4;  // of 4 columns
  for (int i = thread; i < kLinearCudaTile / parts * kVectors; i += kLinearCudaThreads) {
    const int row = i / kVectors * parts + part, column = i % kVectors * 4;
    if (row_begin + row >= params.rows || column_begin + column >= params.columns) continue;
    float4 sum = {0, 0, 0, 0};
    for (int source = 0; source < parts; ++source) {
      const float4 term = ptx::cluster_load(
          reinterpret_cast<const float4*>(shared_sums + row * kLinearCudaSumsStride + column),
          source);
      sum = {sum.x + term.x, sum.y + term.y, sum.z + term.z, sum.w + term.w};
    }
    const float terms[4] = {sum.x, sum.y, sum.z, sum.w};
    struct alignas(8) {
      T element[4];
    } result;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float value = terms[j];
      if (params.bias != nullptr) value += to_float(params.bias[column_begin + column + j]);
      result.element[j] = from_float<T>(params.gelu ? linear_gelu(value) : value);
    }
    *reinterpret_cast<decltype(result)*>(params.out + int64_t{row_begin + row} * params.columns +
                                         column_begin + column) = result;
  }
  ptx::cluster_barrier();  // the others may still read this block's sums
}

}  // namespace flexvar
