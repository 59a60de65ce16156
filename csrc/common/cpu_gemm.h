// Small matrix products on packed tiles, the core of attention and of the linear layer on the CPU.
//
// The left factor is read one entry at a time, the right one by vectors along its rows, and so are
// the sums. An entry of the left factor is a number or, where the CPU multiplies such, a pair of
// bfloat16 that stand side by side along the depth; each 32 bits of the right factor are then such
// a pair too.
#pragma once

#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

#if FLEXVAR_VECTOR_BYTES == 64
constexpr int kRegisterColumns = 4;  // vectors: 6 x 4 accumulators of 32 registers
#else
constexpr int kRegisterColumns = 2;  // 6 x 2 of 16
#endif
constexpr int kRegisterRows = 6;

template <typename T>
constexpr int64_t kLanes = VectorOf<T>::lanes;

template <typename T>
static inline __attribute__((always_inline)) Vector<T> multiply_add(T a, Vector<T> b,
                                                                    Vector<T> sum) {
  return sum + a * b;
}
#ifdef __AVX512BF16__
struct BfloatPair {
  uint32_t bits;
};
static inline __attribute__((always_inline)) Vector<float> multiply_add(BfloatPair a,
                                                                        Vector<float> b,
                                                                        Vector<float> sum) {
  return (Vector<float>)_mm512_dpbf16_ps(
      (__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a.bits)), (__m512bh)b);
}
#endif

// Element (i, k) stands at data[i * row + k * column].
template <typename T>
struct Matrix {
  T* data;
  int64_t row;
  int64_t column = 1;
};

// The left factor's depth may come in runs, so many entries apart; the right one's is whole.
struct Runs {
  int64_t count = 1, stride = 0;
};

// What a product does beside every entry of the depth.
struct Nothing {
  void step() {}
};

// c (+)= a b for kRows rows and kColumns vectors. Every sum is one chain of fused (where the CPU
// has them) multiply-adds in the order of k, whatever tile it is in.
template <typename A, typename T, int kRows, int kColumns, typename Beside>
static inline void multiply_registers(const Matrix<const A>& a, const T* b, int64_t b_row, T* c,
                                      int64_t c_row, int64_t depth, bool accumulate,
                                      const Runs& runs, Beside& beside) {
  const A* first = a.data;
  Vector<T> sum[kRows][kColumns] = {};
  for (int64_t run = 0; run < runs.count; ++run, first += runs.stride) {
    const A* entry = first;
    for (int64_t k = 0; k < depth; ++k) {
      Vector<T> right[kColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) right[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const A left = entry[i * a.row];
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) sum[i][j] = multiply_add(left, right[j], sum[i][j]);
      }
      beside.step();
      entry += a.column;
      b += b_row;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      T* const place = c + i * c_row + j * kLanes<T>;
      store(place, accumulate ? load(place) + sum[i][j] : sum[i][j]);
    }
  }
}

template <typename A, typename T, int kColumns, typename Beside>
static void multiply_columns(const Matrix<const A>& a, const T* b, int64_t b_row, T* c,
                             int64_t c_row, int64_t rows, int64_t depth, bool accumulate,
                             const Runs& runs, Beside& beside) {
  const A* left = a.data;
  for (; rows >= kRegisterRows; rows -= kRegisterRows) {
    multiply_registers<A, T, kRegisterRows, kColumns>({left, a.row, a.column}, b, b_row, c, c_row,
                                                      depth, accumulate, runs, beside);
    left += kRegisterRows * a.row;
    c += kRegisterRows * c_row;
  }
  const Matrix<const A> rest{left, a.row, a.column};
  switch (rows) {
    case 5:
      return multiply_registers<A, T, 5, kColumns>(rest, b, b_row, c, c_row, depth, accumulate,
                                                   runs, beside);
    case 4:
      return multiply_registers<A, T, 4, kColumns>(rest, b, b_row, c, c_row, depth, accumulate,
                                                   runs, beside);
    case 3:
      return multiply_registers<A, T, 3, kColumns>(rest, b, b_row, c, c_row, depth, accumulate,
                                                   runs, beside);
    case 2:
      return multiply_registers<A, T, 2, kColumns>(rest, b, b_row, c, c_row, depth, accumulate,
                                                   runs, beside);
    case 1:
      return multiply_registers<A, T, 1, kColumns>(rest, b, b_row, c, c_row, depth, accumulate,
                                                   runs, beside);
  }
}

// c (+)= a b: a is rows x depth, b depth x (vectors * lanes) and c rows x (vectors * lanes), the
// latter two with contiguous rows.
template <typename T, typename A = T, typename Beside = Nothing>
static void multiply(const Matrix<const A>& a, const Matrix<const T>& b, const Matrix<T>& c,
                     int64_t rows, int64_t vectors, int64_t depth, bool accumulate,
                     const Runs& runs = {}, Beside&& beside = {}) {
  const T* right = b.data;
  T* sums = c.data;
  while (vectors > 0) {
    const int64_t columns = vectors < kRegisterColumns ? vectors : kRegisterColumns;
    switch (columns) {
#if FLEXVAR_VECTOR_BYTES == 64
      case 4:
        multiply_columns<A, T, 4>(a, right, b.row, sums, c.row, rows, depth, accumulate, runs,
                                  beside);
        break;
      case 3:
        multiply_columns<A, T, 3>(a, right, b.row, sums, c.row, rows, depth, accumulate, runs,
                                  beside);
        break;
#endif
      case 2:
        multiply_columns<A, T, 2>(a, right, b.row, sums, c.row, rows, depth, accumulate, runs,
                                  beside);
        break;
      default:
        multiply_columns<A, T, 1>(a, right, b.row, sums, c.row, rows, depth, accumulate, runs,
                                  beside);
    }
    right += columns * kLanes<T>;
    sums += columns * kLanes<T>;
    vectors -= columns;
  }
}

}  // namespace flexvar::FLEXVAR_ISA
