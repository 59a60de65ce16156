// Small matrix products on packed tiles, the core of attention on the CPU. Vectors are GCC vector
// extensions as wide as the instruction set's registers.
#pragma once

#include <stdint.h>

namespace flexvar::FLEXVAR_ISA {

#if defined(FLEXVAR_ISA_avx512) || defined(FLEXVAR_ISA_avx512bf16)
constexpr int kVectorBytes = 64;
constexpr int kRegisterColumns = 4;  // vectors: 6 x 4 accumulators of 32 registers
#elif defined(FLEXVAR_ISA_avx2)
constexpr int kVectorBytes = 32;
constexpr int kRegisterColumns = 2;  // 6 x 2 of 16
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisterColumns = 2;
#endif
constexpr int kRegisterRows = 6;

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <typename T>
using Vec = typename Vector<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
inline __attribute__((always_inline)) Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}
template <typename T>
inline __attribute__((always_inline)) void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = x;
}

// Element (i, k) stands at data[i * row + k * column].
template <typename T>
struct Matrix {
  T* data;
  int64_t row;
  int64_t column = 1;
};

// c (+)= a b for kRows rows and kColumns vectors. Every element of c is one chain of fused (where
// the CPU has them) multiply-adds in the order of k, whatever tile it is in.
template <typename T, int kRows, int kColumns>
inline void multiply_registers(Matrix<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
                               int64_t depth, bool accumulate) {
  Vec<T> sum[kRows][kColumns];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      sum[i][j] = accumulate ? load(c + i * c_row + j * kLanes<T>) : Vec<T>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = load(b + j * kLanes<T>);
    for (int i = 0; i < kRows; ++i) {
      const T left = a.data[i * a.row];
      for (int j = 0; j < kColumns; ++j) sum[i][j] += left * right[j];
    }
    a.data += a.column;
    b += b_row;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) store(c + i * c_row + j * kLanes<T>, sum[i][j]);
  }
}

template <typename T, int kColumns>
void multiply_columns(Matrix<const T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
                      int64_t rows, int64_t depth, bool accumulate) {
  for (; rows >= kRegisterRows; rows -= kRegisterRows) {
    multiply_registers<T, kRegisterRows, kColumns>(a, b, b_row, c, c_row, depth, accumulate);
    a.data += kRegisterRows * a.row;
    c += kRegisterRows * c_row;
  }
  switch (rows) {
    case 5:
      return multiply_registers<T, 5, kColumns>(a, b, b_row, c, c_row, depth, accumulate);
    case 4:
      return multiply_registers<T, 4, kColumns>(a, b, b_row, c, c_row, depth, accumulate);
    case 3:
      return multiply_registers<T, 3, kColumns>(a, b, b_row, c, c_row, depth, accumulate);
    case 2:
      return multiply_registers<T, 2, kColumns>(a, b, b_row, c, c_row, depth, accumulate);
    case 1:
      return multiply_registers<T, 1, kColumns>(a, b, b_row, c, c_row, depth, accumulate);
  }
}

// c (+)= a b: a is rows x depth, b depth x (vectors * lanes) and c rows x (vectors * lanes), the
// latter two with contiguous rows.
template <typename T>
void multiply(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int64_t rows, int64_t vectors,
              int64_t depth, bool accumulate) {
  while (vectors > 0) {
    int64_t columns = vectors < kRegisterColumns ? vectors : kRegisterColumns;
    switch (columns) {
#if defined(FLEXVAR_ISA_avx512) || defined(FLEXVAR_ISA_avx512bf16)
      case 4:
        multiply_columns<T, 4>(a, b.data, b.row, c.data, c.row, rows, depth, accumulate);
        break;
      case 3:
        multiply_columns<T, 3>(a, b.data, b.row, c.data, c.row, rows, depth, accumulate);
        break;
#endif
      case 2:
        multiply_columns<T, 2>(a, b.data, b.row, c.data, c.row, rows, depth, accumulate);
        break;
      default:
        multiply_columns<T, 1>(a, b.data, b.row, c.data, c.row, rows, depth, accumulate);
    }
    b.data += columns * kLanes<T>;
    c.data += columns * kLanes<T>;
    vectors -= columns;
  }
}

// 2^x for x <= 0 (also -inf) to 2 ulp; exactly 0 below 2^-126.5; NaN stays NaN.
inline __attribute__((always_inline)) Vec<float> exp2_nonpositive(Vec<float> x) {
  using Int = Vector<float>::integer;
  x = x < -127.0f ? Vec<float>{} - 127.0f : x;
  const Vec<float> shifted = x + 0x1.8p23f;  // rounds to an integer, which the low bits then hold
  const Vec<float> fraction = x - (shifted - 0x1.8p23f);
  // Minimax polynomial of 2^f on [-0.5, 0.5], relative error 2e-9 before rounding.
  Vec<float> y = fraction * 0.00015345774590969086f + 0.0013399930903688073f;
  y = y * fraction + 0.009618489071726799f;
  y = y * fraction + 0.05550328642129898f;
  y = y * fraction + 0.24022646248340607f;
  y = y * fraction + 0.6931471824645996f;
  y = y * fraction + 1.0f;
  // Casts between vectors keep the bits.
  const Int exponent = ((Int)shifted + 127) << 23;
  return y * (Vec<float>)exponent;
}
inline Vec<double> exp2_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

}  // namespace flexvar::FLEXVAR_ISA
