// layer_norm_modulate, alone or behind a gated residual, and its backward. A team of warps owns a
// row at a time and keeps it in registers, so that every tensor goes through memory once. For
// tokens of C channels the floors are, in bytes a token: C (x + out) forward, C (x + branch + y +
// out) with the residual, C (x + grad_out + grad_x) backward, and beside these C (grad_y + branch +
// grad_branch) behind a residual, with the bytes of an element of each.
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

// Over rows, that the backward makes: the gradients of scale, of shift, and of gate.
__host__ __device__ constexpr int norm_sums(bool has_branch) { return has_branch ? 3 : 2; }

struct LayerNormModulateBackwardCudaParams {
  const void* grad_out;  // [groups * rows_per_group, columns]
  const void* x;         // likewise: what was normalised, y where there is a branch
  NormCudaVectors scale;
  void* grad_x;  // likewise, of x_element
  // If there is a branch, y = x + gate * branch:
  const void* grad_y;  // likewise
  const void* branch;  // likewise, or null
  NormCudaVectors gate;
  void* grad_branch;  // likewise, of branch_element
  // [2, groups, parts, columns], over kNormRowsPerSum rows: of grad_out * n and of grad_out. If
  // there is a branch [3, ...]: and of grad_x * branch.
  float* sums;
  FloatElement grad_element, x_element, grad_y_element, branch_element;
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

// The row comes to the L2 cache while another one is worked on.
template <int kVector, int kItems>
__device__ __forceinline__ void prefetch_row(const void* data, FloatElement element, int64_t offset,
                                             int columns) {
  const int size = element == FloatElement::float32 ? 4 : 2;
  const char* const source = static_cast<const char*>(data) + offset * size;
  for_each_vector<kVector, kItems>(columns,
                                   [&](int, int column) { ptx::prefetch(source + column * size); });
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

// One slot per warp and for each of the sums that a row needs in turn. Two of them are enough for
// rows without a barrier in between: whoever writes a slot again is a barrier behind its readers.
template <class Sums>
struct NormStorage {
  float mean[kNormMaxWarps];
  Sums sums[kNormMaxWarps];
};

__device__ __forceinline__ float2 add_parts(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
__device__ __forceinline__ float4 add_parts(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float add_parts(float a, float b) { return a + b; }
__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
__device__ __forceinline__ float2 shuffle_xor(float2 x, int mask) {
  return make_float2(shuffle_xor(x.x, mask), shuffle_xor(x.y, mask));
}
__device__ __forceinline__ float4 shuffle_xor(float4 x, int mask) {
  return make_float4(shuffle_xor(x.x, mask), shuffle_xor(x.y, mask), shuffle_xor(x.z, mask),
                     shuffle_xor(x.w, mask));
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

template <int kVector, int kItems>
__device__ __forceinline__ float mean_of_row(const float (&row)[kItems], int columns,
                                             float (&slots)[kNormMaxWarps]) {
  float vector_sum[kItems / kVector] = {}, sum = 0;
  for_each_vector<kVector, kItems>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) vector_sum[i / kVector] += row[i + j];
  });
#pragma unroll
  for (int g = 0; g < kItems / kVector; ++g) sum += vector_sum[g];
  return block_sum(sum, slots) / static_cast<float>(columns);
}

// LN(x) = (x - mean) * factor + offset: the mean is rounded, which counts where it is large beside
// the deviation, and the offset takes off what it is off by.
struct Normalization {
  float factor, offset;
};

// Of the sums of x - mean and of its squares.
__device__ __forceinline__ Normalization normalization(float sum, float squares, int columns,
                                                       float eps) {
  const float share = 1.0f / static_cast<float>(columns);
  const float rest = sum * share;
  // In one rounding: a square may be beyond a float's range, and infinity less infinity is no
  // number. Of equal numbers the difference may come out below 0; NaN stays NaN.
  const float variance = fmaf(-rest, rest, squares * share);
  const float factor = 1.0f / sqrtf((variance < 0 ? 0.0f : variance) + eps);
  return {factor, -rest * factor};
}

// --- Kernels -------------------------------------------------------------------------------------

// Team y of block b: row b * blockDim.y + y.
template <int kVector, bool kResidual>
__global__ void __launch_bounds__(kNormMaxThreads)
    layer_norm_modulate_kernel(LayerNormModulateCudaParams params) {
  auto& shared = shared_storage<NormStorage<float2>>();
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
  const float mean = mean_of_row<kVector>(row, columns, shared.mean);
  float2 sums = make_float2(0.0f, 0.0f);
  for_each_vector<kVector, kNormItems>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      row[i + j] -= mean;
      sums.x += row[i + j];
      sums.y = fmaf(row[i + j], row[i + j], sums.y);
    }
  });
  sums = block_sum(sums, shared.sums);
  const Normalization to = normalization(sums.x, sums.y, columns, params.eps);
  for_each_vector<kVector, kNormItems>(columns, [&](int i, int) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      row[i + j] = fmaf(fmaf(row[i + j], to.factor, to.offset), scale[i + j], shift[i + j]);
    }
  });
  store_row<kVector>(row, params.out, params.out_element, offset, columns);
}

// Block b: part b % parts of the rows of group b / parts. With n = LN(x) and g = grad_out * scale:
// grad_x = (g - mean(g) - n * mean(g * n)) / deviation, to which grad_y is added before it is
// rounded; grad_branch = grad_x * gate. What g * n adds up to follows from g * (x - mean), so that
// all sums of a row but its mean are made together. Sums over rows are in shared memory, where each
// thread has its own channels of them: in registers they would leave too few for the row.
template <int kVector, bool kResidual>
__global__ void __launch_bounds__(kNormMaxBackwardThreads)
    layer_norm_modulate_backward_kernel(LayerNormModulateBackwardCudaParams params) {
  constexpr int kItems = kNormBackwardItems;
  using Vector = NormVector<float, kVector>;
  auto& shared = shared_storage<NormStorage<float4>>();
  const int columns = params.columns;
  const auto sums_at = [&](int which, int column) -> Vector& {
    return *reinterpret_cast<Vector*>(dynamic_shared<float>() + which * columns + column);
  };
  constexpr int kSums = norm_sums(kResidual);
  for_each_vector<kVector, kItems>(columns, [&](int, int column) {
#pragma unroll
    for (int which = 0; which < kSums; ++which) sums_at(which, column) = {};
  });
  const int64_t group = blockIdx.x / params.parts, part = blockIdx.x % params.parts;
  const int64_t begin = part * kNormRowsPerSum;
  const int rows = static_cast<int>(min(int64_t(kNormRowsPerSum), params.rows_per_group - begin));
#pragma unroll 1
  for (int r = 0; r < rows; ++r) {
    const int64_t number = group * params.rows_per_group + begin + r, offset = number * columns;
    const int64_t image = number / params.rows_per_image;
    uint32_t words[kItems], grad_words[kItems], y_words[kItems], branch_words[kItems];
    float row[kItems], grad[kItems], scaled[kItems];  // by scale: first that itself
    load_words<kVector>(words, params.x, params.x_element, offset, columns);
    load_words<kVector>(grad_words, params.grad_out, params.grad_element, offset, columns);
    load_vector<kVector>(scaled, params.scale, image, columns);
    if constexpr (kResidual) {
      load_words<kVector>(y_words, params.grad_y, params.grad_y_element, offset, columns);
      load_words<kVector>(branch_words, params.branch, params.branch_element, offset, columns);
    }
    if (kVector > 1 && r + 1 < rows) {  // single elements have too many addresses
      const int64_t next = offset + columns;
      prefetch_row<kVector, kItems>(params.x, params.x_element, next, columns);
      prefetch_row<kVector, kItems>(params.grad_out, params.grad_element, next, columns);
      if constexpr (kResidual) {
        prefetch_row<kVector, kItems>(params.grad_y, params.grad_y_element, next, columns);
        prefetch_row<kVector, kItems>(params.branch, params.branch_element, next, columns);
      }
    }
    row_of_words<kVector>(row, words, params.x_element, columns);
    row_of_words<kVector>(grad, grad_words, params.grad_element, columns);
    const float mean = mean_of_row<kVector>(row, columns, shared.mean);
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for_each_vector<kVector, kItems>(columns, [&](int i, int) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        row[i + j] -= mean;
        sums.x += row[i + j];
        sums.y = fmaf(row[i + j], row[i + j], sums.y);
        scaled[i + j] *= grad[i + j];
        sums.z += scaled[i + j];
        sums.w = fmaf(scaled[i + j], row[i + j], sums.w);
      }
    });
    sums = block_sum(sums, shared.sums);
    const Normalization to = normalization(sums.x, sums.y, columns, params.eps);
    const float mean_grad = sums.z / static_cast<float>(columns);
    const float projection =
        fmaf(sums.w, to.factor, sums.z * to.offset) / static_cast<float>(columns);
    for_each_vector<kVector, kItems>(columns, [&](int i, int column) {
      Vector of_scale = sums_at(0, column), of_shift = sums_at(1, column);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float norm = fmaf(row[i + j], to.factor, to.offset);
        of_scale.element[j] = fmaf(grad[i + j], norm, of_scale.element[j]);
        of_shift.element[j] += grad[i + j];
        grad[i + j] = (scaled[i + j] - mean_grad - norm * projection) * to.factor;
      }
      sums_at(0, column) = of_scale;
      sums_at(1, column) = of_shift;
    });
    if constexpr (kResidual) {
      float grad_y[kItems], branch[kItems], gate[kItems];
      load_vector<kVector>(gate, params.gate, image, columns);
      row_of_words<kVector>(grad_y, y_words, params.grad_y_element, columns);
      row_of_words<kVector>(branch, branch_words, params.branch_element, columns);
      for_each_vector<kVector, kItems>(columns, [&](int i, int column) {
        Vector of_gate = sums_at(2, column);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          grad[i + j] += grad_y[i + j];
          of_gate.element[j] = fmaf(grad[i + j], branch[i + j], of_gate.element[j]);
          branch[i + j] = grad[i + j] * gate[i + j];
        }
        sums_at(2, column) = of_gate;
      });
      store_row<kVector>(branch, params.grad_branch, params.branch_element, offset, columns);
    }
    store_row<kVector>(grad, params.grad_x, params.x_element, offset, columns);
  }
  for_each_vector<kVector, kItems>(columns, [&](int, int column) {
#pragma unroll
    for (int which = 0; which < kSums; ++which) {
      const int64_t index = int64_t{which} * gridDim.x + blockIdx.x;
      *reinterpret_cast<Vector*>(params.sums + index * columns + column) = sums_at(which, column);
    }
  });
}

// sums [number of outs, vectors, parts, columns] to each out [vectors, columns], in the order of
// the parts. Blocks with blockIdx.y = i: out[i].
constexpr int kNormSumThreads = 128;
struct NormSumParams {
  const float* sums;
  float* out[3];
  int64_t vectors, parts;
  int columns;
};
__global__ void __launch_bounds__(kNormSumThreads) norm_sum_parts_kernel(NormSumParams params) {
  const int64_t index = blockIdx.x * int64_t(kNormSumThreads) + threadIdx.x;
  if (index >= params.vectors * params.columns) return;
  const int64_t vector = blockIdx.y * params.vectors + index / params.columns;
  const float* source =
      params.sums + vector * params.parts * params.columns + index % params.columns;
  double sum = 0;
#pragma unroll 8
  for (int64_t part = 0; part < params.parts; ++part) {
    sum += static_cast<double>(source[part * params.columns]);
  }
  float* const out = blockIdx.y == 0   ? params.out[0]
                     : blockIdx.y == 1 ? params.out[1]
                                       : params.out[2];
  out[index] = static_cast<float>(sum);
}

// --- The launch ----------------------------------------------------------------------------------
// Threads of a team: on nothing but the number of channels depends the order of a row's sums.
inline unsigned norm_threads(int64_t columns, int items) {
  return static_cast<unsigned>(divide_up(columns, 32 * items) * 32);
}

// Whether rows can be read in vectors of four; `aligned`: what pointers and strides say.
inline bool norm_in_vectors(int64_t columns, bool aligned) { return aligned && columns % 4 == 0; }

}  // namespace flexvar
