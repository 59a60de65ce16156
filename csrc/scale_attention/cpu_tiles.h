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

// [count, columns] to [columns, kTile], a vector at a time what `change` makes of it; columns up to
// a whole vector are zeros.
template <typename T, typename Change>
inline void transpose_tile(T* transposed, const T* packed, int64_t count, int64_t columns,
                           const Change& change) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t first = 0; first < count; first += lanes) {
    const int64_t rows = count - first < lanes ? count - first : lanes;
    for (int64_t c = 0; c < columns; c += lanes) {
      if (rows == 1) {  // the first scale's, mostly: shuffles would take most of its time
        const Vector<T> row = change(load(packed + first * columns + c));
        T numbers[lanes];
        store(numbers, row);
        for (int64_t i = 0; i < lanes; ++i) {
          Vector<T> alone{};
          alone[0] = numbers[i];
          store(transposed + (c + i) * kTile + first, alone);
        }
        continue;
      }
      Vector<T> square[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) {
        square[i] = i < rows ? change(load(packed + (first + i) * columns + c)) : Vector<T>{};
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) store(transposed + (c + i) * kTile + first, square[i]);
    }
  }
}

template <typename T>
inline void transpose_rows(T* transposed, const T* packed, int64_t count, int64_t dim, T sign) {
  transpose_tile(transposed, packed, count, dim, [&](Vector<T> v) { return sign * v; });
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
