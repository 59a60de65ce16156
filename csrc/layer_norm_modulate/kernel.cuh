// layer_norm_modulate, alone or behind a gated residual, and its backward. A team of warps owns a
// row at a time and keeps it in registers, so that every tensor goes through memory once. For
// tokens of C channels the floors are, in bytes a token: C (x + out) forward, C (x + branch + y +
// out) with the residual, C (x + grad_out + grad_x) backward, with the bytes of an element of each.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/divide_up.h"
#include "common/float_element.h"
#include "common/ptx.cuh"

namespace flexvar {

constexpr int64_t kNormMaxColumns = 4096;
// Channels of a row in one thread's registers. The forward needs few registers beside them, and
// more channels mean fewer warps that wait for each other.
constexpr int kNormItems = 16, kNormBackwardItems = 8;
constexpr int kNormMaxThreads = kNormMaxColumns / kNormItems;
constexpr int kNormMaxBackwardThreads = kNormMaxColumns / kNormBackwardItems;
constexpr int kNormMaxWarps = kNormMaxBackwardThreads / 32;
constexpr int kNormRowsPerBlock = 4;  // of the forward, where a row is a single warp's
constexpr int kNormRowsPerSum = 16;   // rows whose products one block of the backward sums

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
  unsigned rows, rows_per_image;
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

// --- A row in the registers of a team ------------------------------------------------------------

// float row[kItems]: warp w of the
// team, which are the threads of one threadIdx.y, holds 32 * kItems channels from w * 32 * kItems
// on, its lane l of them (g * 32 + l) * kVector + 0 … kVector - 1 for g < kItems / kVector.

// f(index of the first item, channel) for every vector of the thread that lies inside the row.
template <int kVector, int kItems, class F>
__device__ __forceinline__ void for_each_vector(int columns, F f) {
  const int thread = static_cast<int>(threadIdx.x);
  const int first = thread / 32 * 32 * kItems + thread % 32 * kVector;
#pragma unroll
  for (int g = 0; g < kItems / kVector; ++g) {
    const int column = first + g * 32 * kVector;
    if (column < columns) f(g * kVector, column);
  }
}

template <class T, int kVector>
struct alignas(sizeof(T) * kVector) NormVector {
  T element[kVector];
};

// The thread's items as they lie in memory, two 16-bit elements of a vector in one word: what a row
// needs of several tensors is all on its way before the first conversion waits for it.
template <int kSize, int kVector, int kItems>
__device__ __forceinline__ void load_words_of(uint32_t (&words)[kItems], const void* data,
                                              int64_t offset, int columns) {
  using Word = std::conditional_t<kSize * kVector == 2, uint16_t, uint32_t>;
  constexpr int kWords = kSize * kVector / static_cast<int>(sizeof(Word));
  using V = NormVector<Word, kWords>;
  const char* const source = static_cast<const char*>(data) + offset * kSize;
  for_each_vector<kVector, kItems>(columns, [&](int i, int column) {
    const V loaded = *reinterpret_cast<const V*>(source + column * kSize);
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[i + w] = loaded.element[w];
  });
}

template <int kVector, int kItems>
__device__ __forceinline__ void load_words(uint32_t (&words)[kItems], const void* data,
                                           FloatElement element, int64_t offset, int columns) {
  if (element == FloatElement::float32) {
    load_words_of<4, kVector>(words, data, offset, columns);
  } else {
    load_words_of<2, kVector>(words, data, offset, columns);
  }
}

template <class T>
__device__ __forceinline__ float element_of_word(uint32_t word, int index) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __half>) {
    return to_float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * index)));
  } else {
    return __uint_as_float(index == 0 ? word << 16 : word & 0xffff0000u);
  }
}

template <class T, int kVector, int kItems>
__device__ __forceinline__ void row_of_words_as(float (&row)[kItems],
                                                const uint32_t (&words)[kItems], int columns) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  for_each_vector<kVector, kItems>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      row[i + j] = element_of_word<T>(words[i + j / kPerWord], j % kPerWord);
    }
  });
}

template <int kVector, int kItems>
__device__ __forceinline__ void row_of_words(float (&row)[kItems], const uint32_t (&words)[kItems],
                                             FloatElement element, int columns) {
  switch (element) {
    case FloatElement::float32:
      return row_of_words_as<float, kVector>(row, words, columns);
    case FloatElement::float16:
      return row_of_words_as<__half, kVector>(row, words, columns);
    case FloatElement::bfloat16:
      return row_of_words_as<__nv_bfloat16, kVector>(row, words, columns);
  }
}

// Rounds the row to what was stored.
template <class T, int kVector, int kItems>
__device__ __forceinline__ void store_row_as(float (&row)[kItems], void* data, int64_t offset,
                                             int columns) {
  using V = NormVector<T, kVector>;
  T* target = static_cast<T*>(data) + offset;
  for_each_vector<kVector, kItems>(columns, [&](int i, int column) {
    V stored;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      stored.element[j] = from_float<T>(row[i + j]);
      row[i + j] = to_float(stored.element[j]);
    }
    *reinterpret_cast<V*>(target + column) = stored;
  });
}

template <int kVector, int kItems>
__device__ __forceinline__ void store_row(float (&row)[kItems], void* data, FloatElement element,
                                          int64_t offset, int columns) {
  switch (element) {
    case FloatElement::float32:
      return store_row_as<float, kVector>(row, data, offset, columns);
    case FloatElement::float16:
      return store_row_as<__half, kVector>(row, data, offset, columns);
    case FloatElement::bfloat16:
      return store_row_as<__nv_bfloat16, kVector>(row, data, offset, columns);
  }
}

template <int kVector, int kItems>
__device__ __forceinline__ void load_vector(float (&row)[kItems], const NormCudaVectors& vectors,
                                            int64_t image, int columns) {
  const float* const source = vectors.data + image * vectors.stride;
  for_each_vector<kVector, kItems>(columns, [&](int i, int column) {
    const auto loaded = *reinterpret_cast<const NormVector<float, kVector>*>(source + column);
#pragma unroll
    for (int j = 0; j < kVector; ++j) row[i + j] = loaded.element[j];
  });
}

// --- Sums over a row -----------------------------------------------------------------------------

// One slot per warp
// and for each of the sums that a row needs in turn. Three of them are enough for rows without a
// barrier in between: whoever writes a slot again is two barriers behind its readers.
struct NormStorage {
  float mean[kNormMaxWarps];
  float2 square[kNormMaxWarps];
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

// The sum over the team's threads, the same bits in all of them. One barrier, unless the team is a
// warp: larger ones are alone in their block.
template <class T>
__device__ __forceinline__ T block_sum(T value, T (&slots)[kNormMaxWarps]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = add_parts(value, shuffle_xor(value, mask));
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warps == 1) return value;
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  value = slots[0];
#pragma unroll 1
  for (int warp = 1; warp < warps; ++warp) value = add_parts(value, slots[warp]);
  return value;
}

// row = (row - mean) / sqrt(variance + eps); returns the factor. The mean is rounded, which counts
// where it is large beside the deviation: what it is off by is taken off, too.
template <int kVector, int kItems>
__device__ __forceinline__ float normalize_row(float (&row)[kItems], int columns, float eps,
                                               NormStorage& shared) {
  const float share = 1.0f / static_cast<float>(columns);
  float vector_sum[kItems / kVector] = {}, sum = 0;
  for_each_vector<kVector, kItems>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) vector_sum[i / kVector] += row[i + j];
  });
#pragma unroll
  for (int g = 0; g < kItems / kVector; ++g) sum += vector_sum[g];
  const float mean = block_sum(sum, shared.mean) / static_cast<float>(columns);
  float2 sums = make_float2(0.0f, 0.0f);  // of differences from the mean, and of their squares
  for_each_vector<kVector, kItems>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      row[i + j] -= mean;
      sums.x += row[i + j];
      sums.y = fmaf(row[i + j], row[i + j], sums.y);
    }
  });
  sums = block_sum(sums, shared.square);
  const float rest = sums.x * share;
  // In one rounding: a square may be beyond a float's range, and infinity less infinity is no
  // number. Of equal numbers the difference may come out below 0; NaN stays NaN.
  const float variance = fmaf(-rest, rest, sums.y * share);
  const float factor = 1.0f / sqrtf((variance < 0 ? 0.0f : variance) + eps);
  const float offset = -rest * factor;
  for_each_vector<kVector, kItems>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) row[i + j] = fmaf(row[i + j], factor, offset);
  });
  return factor;
}

// --- Kernels -------------------------------------------------------------------------------------

// Team y of block b: row b * blockDim.y + y.
template <int kVector, bool kResidual>
__global__ void __launch_bounds__(kNormMaxThreads)
    layer_norm_modulate_kernel(LayerNormModulateCudaParams params) {
  auto& shared = shared_storage<NormStorage>();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const unsigned number = blockIdx.x * blockDim.y + threadIdx.y;
  if (number >= params.rows) return;
  const int columns = params.columns;
  const int64_t image = number / params.rows_per_image, offset = number * int64_t(columns);
  uint32_t words[kNormItems], branch_words[kNormItems];
  float gate[kNormItems], scale[kNormItems], shift[kNormItems], row[kNormItems];
  load_words<kVector>(words, params.x, params.x_element, offset, columns);
  if constexpr (kResidual) {
    load_words<kVector>(branch_words, params.branch, params.branch_element, offset, columns);
    load_vector<kVector>(gate, params.gate, image, columns);
  }
  load_vector<kVector>(scale, params.scale, image, columns);
  load_vector<kVector>(shift, params.shift, image, columns);
  row_of_words<kVector>(row, words, params.x_element, columns);
  if constexpr (kResidual) {
    float branch[kNormItems];
    row_of_words<kVector>(branch, branch_words, params.branch_element, columns);
    for_each_vector<kVector, kNormItems>(columns, [&](int i, int) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) row[i + j] = fmaf(gate[i + j], branch[i + j], row[i + j]);
    });
    store_row<kVector>(row, params.y, params.x_element, offset, columns);
  }
  normalize_row<kVector>(row, columns, params.eps, shared);
  for_each_vector<kVector, kNormItems>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) row[i + j] = fmaf(row[i + j], scale[i + j], shift[i + j]);
  });
  store_row<kVector>(row, params.out, params.out_element, offset, columns);
}

// Block b: part b % parts of the rows of group b / parts. With n = LN(x) and g = grad_out * scale:
// grad_x = (g - mean(g) - n * mean(g * n)) / deviation.
template <int kVector>
__global__ void __launch_bounds__(kNormMaxBackwardThreads)
    layer_norm_modulate_backward_kernel(LayerNormModulateBackwardCudaParams params) {
  auto& shared = shared_storage<NormStorage>();
  const int columns = params.columns;
  const int64_t group = blockIdx.x / params.parts, part = blockIdx.x % params.parts;
  const int64_t begin = part * kNormRowsPerSum;
  const int rows = static_cast<int>(min(int64_t(kNormRowsPerSum), params.rows_per_group - begin));
  float scale_sum[kNormBackwardItems] = {}, shift_sum[kNormBackwardItems] = {};
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    const int64_t row = group * params.rows_per_group + begin + r, offset = row * columns;
    float norm[kNormBackwardItems], grad[kNormBackwardItems];
    uint32_t words[kNormBackwardItems], grad_words[kNormBackwardItems];
    load_words<kVector>(words, params.x, params.x_element, offset, columns);
    load_words<kVector>(grad_words, params.grad_out, params.grad_element, offset, columns);
    row_of_words<kVector>(norm, words, params.x_element, columns);
    row_of_words<kVector>(grad, grad_words, params.grad_element, columns);
    const float factor = normalize_row<kVector>(norm, columns, params.eps, shared);
    const float* scale = params.scale.data + row / params.rows_per_image * params.scale.stride;
    float2 sums = make_float2(0.0f, 0.0f);
    for_each_vector<kVector, kNormBackwardItems>(columns, [&](int i, int column) {
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
    for_each_vector<kVector, kNormBackwardItems>(columns, [&](int i, int) {
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

// --- The launch ----------------------------------------------------------------------------------
// Threads of a team: on nothing but the number of channels depends the order of a row's sums.
inline unsigned norm_threads(int64_t columns, int items) {
  return static_cast<unsigned>(divide_up(columns, 32 * items) * 32);
}

// Whether rows can be read in vectors of four; `aligned`: what pointers and strides say.
inline bool norm_in_vectors(int64_t columns, bool aligned) { return aligned && columns % 4 == 0; }

}  // namespace flexvar
