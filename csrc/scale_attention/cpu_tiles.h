// Moving tiles between strided tensors of any element type and packed arrays of the type T that
// arithmetic is done in.
#pragma once

#include "common/cpu_gemm.h"
#include "scale_attention/cpu_kernel.h"
#include "scale_attention/tile.h"

namespace flexvar::FLEXVAR_ISA {

constexpr int64_t kTile = kAttentionTileQueries;
constexpr int64_t kKeyBlock = kAttentionKeyBlock;

// Hands out arrays from one block of memory, each aligned to 64 bytes.
struct Scratch {
  char* next;
  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return array;
  }
};

// Rows of one head: token t begins at data + t * stride.
template <typename E>
struct HeadRows {
  const E* data;
  int64_t stride;
};
template <typename E>
inline HeadRows<E> head_rows(const AttentionTensor& tensor, int64_t head, int64_t heads) {
  return {static_cast<const E*>(tensor.data) + head / heads * tensor.batch_stride +
              head % heads * tensor.head_stride,
          tensor.token_stride};
}

template <typename T, typename E>
inline void load_rows(T* packed, HeadRows<E> rows, int64_t begin, int64_t end, int64_t dim) {
  for (int64_t t = begin; t < end; ++t, packed += dim) {
    const E* row = rows.data + t * rows.stride;
    for (int64_t d = 0; d < dim; ++d) packed[d] = to_float(row[d]);
  }
}

// [count, dim] packed to [dim, kTile], times `sign`; columns up to a whole vector are zeros.
template <typename T>
inline void transpose_rows(T* transposed, const T* packed, int64_t count, int64_t dim, T sign) {
  const int64_t padded = (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t i = 0; i < count; ++i) transposed[d * kTile + i] = sign * packed[i * dim + d];
    for (int64_t i = count; i < padded; ++i) transposed[d * kTile + i] = 0;
  }
}

// Row i of `packed` times factor[i * factor_step] to row begin + i of one head of a contiguous
// [B, L, H, D].
template <typename T, typename E>
inline void store_rows(E* tensor, const T* packed, const T* factor, int64_t factor_step,
                       int64_t head, const AttentionShape& shape, int64_t tokens, int64_t begin,
                       int64_t count) {
  const int64_t batch = head / shape.heads, column = head % shape.heads * shape.dim;
  for (int64_t i = 0; i < count; ++i) {
    E* row = tensor + (batch * tokens + begin + i) * shape.heads * shape.dim + column;
    const T scale = factor[i * factor_step];
    for (int64_t d = 0; d < shape.dim; ++d)
      row[d] = from_float<E>(packed[i * shape.dim + d] * scale);
  }
}

}  // namespace flexvar::FLEXVAR_ISA
