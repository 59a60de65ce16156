// layer_norm_modulate, alone or behind a gated residual, and its backward. A block owns a row at a
// time and keeps it in registers, so that every tensor goes through memory once. For tokens of C
// channels the floors are, in bytes a token: C (x + out) forward, C (x + branch + y + out) with the
// residual, C (x + grad_out + grad_x) backward, with the bytes of an element of each.
#pragma once

#include "common/cuda.cuh"
#include "common/float_element.h"

namespace flexvar {

constexpr int kNormMaxThreads = 512;
constexpr int kNormMaxWarps = kNormMaxThreads / 32;
constexpr int kNormItems = 8;  // channels of a row in one thread's registers
constexpr int64_t kNormMaxColumns = int64_t(kNormMaxThreads) * kNormItems;
constexpr int kNormRowsPerSum = 16;  // rows whose products one block of the backward sums

struct NormCudaVectors {
  const float* data;
  int64_t stride;  // from one image's vector to the next one's; 0: one for all
};

// y = x + gate * branch (without a branch y = x, not written); out = LN(y) * scale + shift.
struct LayerNormModulateCudaParams {
  const void* x;       // [rows, columns]
  const void* branch;  // [rows, columns], or null
  NormCudaVectors gate, scale, shift;
  void* y;    // [rows, columns] of x_element, if there is a branch
  void* out;  // [rows, columns]
  FloatElement x_element, branch_element, out_element;
  int64_t rows, rows_per_image;
  int columns;
  float eps;
};

struct LayerNormModulateBackwardCudaParams {
  const void* grad_out;  // [groups * rows_per_group, columns]
  const void* x;         // likewise
  NormCudaVectors scale;
  void* grad_x;  // likewise, of x_element
  float* sums;   // [2, groups, parts, columns], over kNormRowsPerSum rows: of grad_out * n and of
                 // grad_out
  FloatElement grad_element, x_element;
  int64_t groups, rows_per_group, parts, rows_per_image;
  int columns;
  float eps;
};

// --- A row in the registers of a block
// ------------------------------------------------------------- float row[kNormItems]: thread t
// holds channels (g * blockDim.x + t) * kVector + 0 … kVector - 1 for g < kNormItems / kVector.

// f(index of the first item, channel) for every vector of the thread that lies inside the row.
template <int kVector, class F>
__device__ __forceinline__ void for_each_vector(int columns, F f) {
#pragma unroll
  for (int g = 0; g < kNormItems / kVector; ++g) {
    const int column = (g * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVector;
    if (column < columns) f(g * kVector, column);
  }
}

template <class T, int kVector>
struct alignas(sizeof(T) * kVector) NormVector {
  T element[kVector];
};

template <class T, int kVector>
__device__ __forceinline__ void load_row_as(float (&row)[kNormItems], const void* data,
                                            int64_t offset, int columns) {
  using V = NormVector<T, kVector>;
  const T* source = static_cast<const T*>(data) + offset;
  for_each_vector<kVector>(columns, [&](int i, int column) {
    const V loaded = *reinterpret_cast<const V*>(source + column);
#pragma unroll
    for (int j = 0; j < kVector; ++j) row[i + j] = to_float(loaded.element[j]);
  });
}

template <int kVector>
__device__ __forceinline__ void load_row(float (&row)[kNormItems], const void* data,
                                         FloatElement element, int64_t offset, int columns) {
  switch (element) {  // outside the loop: the loads of a row are all under way at once
    case FloatElement::float32:
      return load_row_as<float, kVector>(row, data, offset, columns);
    case FloatElement::float16:
      return load_row_as<__half, kVector>(row, data, offset, columns);
    case FloatElement::bfloat16:
      return load_row_as<__nv_bfloat16, kVector>(row, data, offset, columns);
  }
}

// Rounds the row to what was stored.
template <class T, int kVector>
__device__ __forceinline__ void store_row_as(float (&row)[kNormItems], void* data, int64_t offset,
                                             int columns) {
  using V = NormVector<T, kVector>;
  T* target = static_cast<T*>(data) + offset;
  for_each_vector<kVector>(columns, [&](int i, int column) {
    V stored;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      stored.element[j] = from_float<T>(row[i + j]);
      row[i + j] = to_float(stored.element[j]);
    }
    *reinterpret_cast<V*>(target + column) = stored;
  });
}

template <int kVector>
__device__ __forceinline__ void store_row(float (&row)[kNormItems], void* data,
                                          FloatElement element, int64_t offset, int columns) {
  switch (element) {
    case FloatElement::float32:
      return store_row_as<float, kVector>(row, data, offset, columns);
    case FloatElement::float16:
      return store_row_as<__half, kVector>(row, data, offset, columns);
    case FloatElement::bfloat16:
      return store_row_as<__nv_bfloat16, kVector>(row, data, offset, columns);
  }
}

template <int kVector>
__device__ __forceinline__ void load_vector(float (&row)[kNormItems],
                                            const NormCudaVectors& vectors, int64_t image,
                                            int columns) {
  load_row_as<float, kVector>(row, vectors.data, image * vectors.stride, columns);
}

// --- Sums over a row
// ------------------------------------------------------------------------------- One slot per warp
// and for each of the sums that a row needs in turn. Three of them are enough for rows without a
// barrier in between: whoever writes a slot again is two barriers behind its readers.
struct NormStorage {
  float mean[kNormMaxWarps];
  float square[kNormMaxWarps];
  float2 product[kNormMaxWarps];
};

__device__ __forceinline__ float2 add_parts(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
__device__ __forceinline__ float add_parts(float a, float b) { return a + b; }
__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
__device__ __forceinline__ float2 shuffle_xor(float2 x, int mask) {
  return make_float2(shuffle_xor(x.x, mask), shuffle_xor(x.y, mask));
}

// The sum over the block's threads, the same bits in all of them. One barrier.
template <class T>
__device__ __forceinline__ T block_sum(T value, T (&slots)[kNormMaxWarps]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = add_parts(value, shuffle_xor(value, mask));
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warps == 1) return value;
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  value = slots[0];
  for (int warp = 1; warp < warps; ++warp) value = add_parts(value, slots[warp]);
  return value;
}

// row = (row - mean) / sqrt(variance + eps); returns the factor.
template <int kVector>
__device__ __forceinline__ float normalize_row(float (&row)[kNormItems], int columns, float eps,
                                               NormStorage& shared) {
  float sum = 0;
  for_each_vector<kVector>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += row[i + j];
  });
  const float mean = block_sum(sum, shared.mean) / static_cast<float>(columns);
  float squares = 0;
  for_each_vector<kVector>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      row[i + j] -= mean;
      squares = fmaf(row[i + j], row[i + j], squares);
    }
  });
  const float variance = block_sum(squares, shared.square) / static_cast<float>(columns);
  const float factor = 1.0f / sqrtf(variance + eps);
  for_each_vector<kVector>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) row[i + j] *= factor;
  });
  return factor;
}

// --- Kernels
// --------------------------------------------------------------------------------------- Block b:
// row b.
template <int kVector>
__global__ void __launch_bounds__(kNormMaxThreads, kVector == 4 ? 2 : 1)
    layer_norm_modulate_kernel(LayerNormModulateCudaParams params) {
  auto& shared = shared_storage<NormStorage>();
  const int columns = params.columns;
  const int64_t image = blockIdx.x / params.rows_per_image, offset = blockIdx.x * int64_t(columns);
  float row[kNormItems], other[kNormItems], factor[kNormItems];
  load_row<kVector>(row, params.x, params.x_element, offset, columns);
  if (params.branch != nullptr) {
    load_row<kVector>(other, params.branch, params.branch_element, offset, columns);
    load_vector<kVector>(factor, params.gate, image, columns);
    for_each_vector<kVector>(columns, [&](int i, int) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) row[i + j] = fmaf(factor[i + j], other[i + j], row[i + j]);
    });
    store_row<kVector>(row, params.y, params.x_element, offset, columns);
  }
  // Asked for before the sums need their time.
  load_vector<kVector>(factor, params.scale, image, columns);
  load_vector<kVector>(other, params.shift, image, columns);
  normalize_row<kVector>(row, columns, params.eps, shared);
  for_each_vector<kVector>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) row[i + j] = fmaf(row[i + j], factor[i + j], other[i + j]);
  });
  store_row<kVector>(row, params.out, params.out_element, offset, columns);
}

// Block b: part b % parts of the rows of group b / parts. With n = LN(x) and g = grad_out * scale:
// grad_x = (g - mean(g) - n * mean(g * n)) / deviation.
template <int kVector>
__global__ void __launch_bounds__(kNormMaxThreads, kVector == 4 ? 2 : 1)
    layer_norm_modulate_backward_kernel(LayerNormModulateBackwardCudaParams params) {
  auto& shared = shared_storage<NormStorage>();
  const int columns = params.columns;
  const int64_t group = blockIdx.x / params.parts, part = blockIdx.x % params.parts;
  const int64_t begin = part * kNormRowsPerSum;
  const int rows = static_cast<int>(min(int64_t(kNormRowsPerSum), params.rows_per_group - begin));
  float scale_sum[kNormItems] = {}, shift_sum[kNormItems] = {};
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    const int64_t row = group * params.rows_per_group + begin + r, offset = row * columns;
    float norm[kNormItems], grad[kNormItems];
    load_row<kVector>(norm, params.x, params.x_element, offset, columns);
    load_row<kVector>(grad, params.grad_out, params.grad_element, offset, columns);
    const float factor = normalize_row<kVector>(norm, columns, params.eps, shared);
    const float* scale = params.scale.data + row / params.rows_per_image * params.scale.stride;
    float2 sums = make_float2(0.0f, 0.0f);
    for_each_vector<kVector>(columns, [&](int i, int column) {
      const auto vector = *reinterpret_cast<const NormVector<float, kVector>*>(scale + column);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        scale_sum[i + j] = fmaf(grad[i + j], norm[i + j], scale_sum[i + j]);
        shift_sum[i + j] += grad[i + j];
        grad[i + j] *= vector.element[j];
        sums.x += grad[i + j];
        sums.y = fmaf(grad[i + j], norm[i + j], sums.y);
      }
    });
    sums = block_sum(sums, shared.product);
    const float mean = sums.x / static_cast<float>(columns);
    const float projection = sums.y / static_cast<float>(columns);
    for_each_vector<kVector>(columns, [&](int i, int) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        grad[i + j] = (grad[i + j] - mean - norm[i + j] * projection) * factor;
      }
    });
    store_row<kVector>(grad, params.grad_x, params.x_element, offset, columns);
  }
  store_row_as<float, kVector>(scale_sum, params.sums, blockIdx.x * int64_t(columns), columns);
  store_row_as<float, kVector>(shift_sum, params.sums, (int64_t(gridDim.x) + blockIdx.x) * columns,
                               columns);
}

// sums [vectors, parts, columns] to out [vectors, columns], in the order of the parts.
constexpr int kNormSumThreads = 128;
struct NormSumParams {
  const float* sums;
  float* out;
  int64_t vectors, parts;
  int columns;
};
__global__ void __launch_bounds__(kNormSumThreads) norm_sum_parts_kernel(NormSumParams params) {
  const int64_t index = blockIdx.x * int64_t(kNormSumThreads) + threadIdx.x;
  if (index >= params.vectors * params.columns) return;
  const float* source =
      params.sums + index / params.columns * params.parts * params.columns + index % params.columns;
  double sum = 0;
#pragma unroll 8
  for (int64_t part = 0; part < params.parts; ++part) {
    sum += static_cast<double>(source[part * params.columns]);
  }
  params.out[index] = static_cast<float>(sum);
}

// --- The launch
// ------------------------------------------------------------------------------------
inline int norm_threads(int64_t columns) {
  return static_cast<int>((columns + 32 * kNormItems - 1) / (32 * kNormItems) * 32);
}

// Whether rows can be read in vectors of four; `aligned`: what pointers and strides say.
inline bool norm_in_vectors(int64_t columns, bool aligned) { return aligned && columns % 4 == 0; }

}  // namespace flexvar
