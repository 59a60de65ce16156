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

  // As a left factor: the entry of row i where the walk along the depth is; steps to the next one,
  // and, every line() of them, to the next line.
  T& operator[](int64_t i) const { return data[i * row]; }
  int64_t line() const { return INT64_MAX; }
  void step() { data += column; }
  void next_line() {}
};

// A left factor whose depth comes in runs, so many entries apart.
template <typename T>
struct Runs {
  T* data;
  int64_t row, run, stride;

  T& operator[](int64_t i) const { return data[i * row]; }
  int64_t line() const { return run; }
  void step() { ++data; }
  void next_line() { data += stride - run; }
};

// A left factor in groups of kRegisterRows rows: kLine entries of each row of the group side by
// side, then the next ones of each. It is read from end to end, which the CPU sees coming; for rows
// that lie apart it may wait for the L3 cache.
template <typename T>
struct Lines {
  static constexpr int64_t kLine = 16;
  T* data;
  int64_t row;  // entries of one, a multiple of kLine

  T& operator[](int64_t i) const { return data[i * kLine]; }
  int64_t line() const { return kLine; }
  void step() { ++data; }
  void next_line() { data += (kRegisterRows - 1) * kLine; }
};

// What a product does beside every line of the depth.
struct Nothing {
  void step() {}
};

// c (+)= a b for kRows rows and kColumns vectors. Every sum is one chain of fused (where the CPU
// has them) multiply-adds in the order of k, whatever tile it is in.
template <int kRows, int kColumns, typename Left, typename T, typename Beside>
static inline void multiply_registers(Left a, const T* b, int64_t b_row, T* c, int64_t c_row,
                                      int64_t depth, bool accumulate, Beside& beside) {
  Vector<T> sum[kRows][kColumns] = {};
  for (int64_t left = depth; left > 0; left -= a.line()) {
    const int64_t steps = left < a.line() ? left : a.line();
    for (int64_t k = 0; k < steps; ++k) {
      Vector<T> right[kColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        right[j] = load(b + j * kLanes<T>);
#if FLEXVAR_VECTOR_BYTES == 64
        if constexpr (kRows > 1) asm("" : "+v"(right[j]));  // or GCC loads it for each of few rows
#endif
      }
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const auto entry = a[i];
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) sum[i][j] = multiply_add(entry, right[j], sum[i][j]);
      }
      a.step();
      b += b_row;
    }
    beside.step();
    a.next_line();
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

template <int kColumns, typename Left, typename T, typename Beside>
static void multiply_columns(Left a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
                             int64_t depth, bool accumulate, Beside& beside) {
  for (; rows >= kRegisterRows; rows -= kRegisterRows) {
    multiply_registers<kRegisterRows, kColumns>(a, b, b_row, c, c_row, depth, accumulate, beside);
    a.data += kRegisterRows * a.row;
    c += kRegisterRows * c_row;
  }
  switch (rows) {
    case 5:
      return multiply_registers<5, kColumns>(a, b, b_row, c, c_row, depth, accumulate, beside);
    case 4:
      return multiply_registers<4, kColumns>(a, b, b_row, c, c_row, depth, accumulate, beside);
    case 3:
      return multiply_registers<3, kColumns>(a, b, b_row, c, c_row, depth, accumulate, beside);
    case 2:
      return multiply_registers<2, kColumns>(a, b, b_row, c, c_row, depth, accumulate, beside);
    case 1:
      return multiply_registers<1, kColumns>(a, b, b_row, c, c_row, depth, accumulate, beside);
  }
}

// c (+)= a b: a, of one of the types above, is rows x depth, b depth x (vectors * lanes) and c rows
// x (vectors * lanes), the latter two with contiguous rows.
template <typename Left, typename T, typename Beside = Nothing>
static void multiply_left(const Left& a, const Matrix<const T>& b, const Matrix<T>& c, int64_t rows,
                          int64_t vectors, int64_t depth, bool accumulate, Beside&& beside = {}) {
  const T* right = b.data;
  T* sums = c.data;
  while (vectors > 0) {
    const int64_t columns = vectors < kRegisterColumns ? vectors : kRegisterColumns;
    switch (columns) {
#if FLEXVAR_VECTOR_BYTES == 64
      case 4:
        multiply_columns<4>(a, right, b.row, sums, c.row, rows, depth, accumulate, beside);
        break;
      case 3:
        multiply_columns<3>(a, right, b.row, sums, c.row, rows, depth, accumulate, beside);
        break;
#endif
      case 2:
        multiply_columns<2>(a, right, b.row, sums, c.row, rows, depth, accumulate, beside);
        break;
      default:
        multiply_columns<1>(a, right, b.row, sums, c.row, rows, depth, accumulate, beside);
    }
    right += columns * kLanes<T>;
    sums += columns * kLanes<T>;
    vectors -= columns;
  }
}

template <typename T, typename A = T>
static void multiply(const Matrix<const A>& a, const Matrix<const T>& b, const Matrix<T>& c,
                     int64_t rows, int64_t vectors, int64_t depth, bool accumulate) {
  multiply_left(a, b, c, rows, vectors, depth, accumulate);
}

}  // namespace flexvar::FLEXVAR_ISA
