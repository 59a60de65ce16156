// The heart of the linear layer: inner products of a few rows of x with a few rows of the weight.
//
// Both are contiguous along the depth, so nothing is packed: the lanes of an accumulator run along
// the depth, and are summed across at the end. Every sum has one order, given by the depth alone:
// by lanes, then across them. It does not matter which other rows are computed beside it.
#pragma once

#include "common/cpu_vector.h"
#include "linear/cpu_kernel.h"

namespace flexvar::FLEXVAR_ISA {

#if FLEXVAR_VECTOR_BYTES == 64
constexpr int kTileRows = 3, kTileColumns = 8;  // accumulators of 32 registers
#else
constexpr int kTileRows = 3, kTileColumns = 4;  // of 16 registers
#endif
static_assert(kLinearColumnStep % kTileColumns == 0);

// --- products: elements of type E are multiplied as ArithmeticOf<E>::Type ------------------------
static inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> sum) {
  return sum + a * b;
}

#ifdef FLEXVAR_ISA_avx512bf16
using BfloatPairs = __m512bh;
static inline BfloatPairs load_step(const Bfloat16* p) {
  return (BfloatPairs)_mm512_loadu_si512(p);
}
static inline BfloatPairs load_step_first(const Bfloat16* p, int64_t n) {
  return (BfloatPairs)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << n) - 1), p);
}
static inline Vector<float> multiply_add(BfloatPairs a, BfloatPairs b, Vector<float> sum) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, a, b);
}
template <typename E>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<Bfloat16> {
  using Type = Bfloat16;
};
#else
template <typename E>
struct ArithmeticOf {
  using Type = float;
};
#endif
static inline Vector<float> load_step(const float* p) { return load(p); }
static inline Vector<float> load_step_first(const float* p, int64_t n) { return load_first(p, n); }
template <typename E>
constexpr int64_t kStep = FLEXVAR_VECTOR_BYTES / sizeof(E);

// --- sums across lanes ---------------------------------------------------------------------------
typedef float TileRow __attribute__((vector_size(4 * kTileColumns)));

// Four vectors to one: each of its 128-bit groups holds the four sums over such a group.
static inline Vector<float> sum_groups(Vector<float> a, Vector<float> b, Vector<float> c,
                                       Vector<float> d) {
#if FLEXVAR_VECTOR_BYTES == 64
  const auto low = [](Vector<float> p, Vector<float> q) {
    return (Vector<float>)_mm512_maskz_unpacklo_ps(0xffff, (__m512)p, (__m512)q);
  };
  const auto high = [](Vector<float> p, Vector<float> q) {
    return (Vector<float>)_mm512_maskz_unpackhi_ps(0xffff, (__m512)p, (__m512)q);
  };
#elif FLEXVAR_VECTOR_BYTES == 32
  const auto low = [](Vector<float> p, Vector<float> q) {
    return (Vector<float>)_mm256_unpacklo_ps((__m256)p, (__m256)q);
  };
  const auto high = [](Vector<float> p, Vector<float> q) {
    return (Vector<float>)_mm256_unpackhi_ps((__m256)p, (__m256)q);
  };
#else
  const auto low = [](Vector<float> p, Vector<float> q) { return interleave_low(p, q); };
  const auto high = [](Vector<float> p, Vector<float> q) { return interleave_high(p, q); };
#endif
  // a0+a2 c0+c2 a1+a3 c1+c3, and b with d likewise
  const Vector<float> ac = low(a, c) + high(a, c), bd = low(b, d) + high(b, d);
  return low(ac, bd) + high(ac, bd);
}

static inline TileRow sum_lanes(const Vector<float> (&v)[kTileColumns]) {
#if FLEXVAR_VECTOR_BYTES == 64
  const Vector<float> p = sum_groups(v[0], v[1], v[2], v[3]),
                      q = sum_groups(v[4], v[5], v[6], v[7]);
  const Vector<float> half =
      __builtin_shufflevector(p, q, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
      __builtin_shufflevector(p, q, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(half, half, 4, 5, 6, 7, 12, 13, 14, 15);
#elif FLEXVAR_VECTOR_BYTES == 32
  const Vector<float> p = sum_groups(v[0], v[1], v[2], v[3]);
  return __builtin_shufflevector(p, p, 0, 1, 2, 3) + __builtin_shufflevector(p, p, 4, 5, 6, 7);
#else
  return sum_groups(v[0], v[1], v[2], v[3]);
#endif
}

// --- the tile ------------------------------------------------------------------------------------
// sum[i][j] = <x + i * x_stride, weight[j]>, by lanes.
template <int kRows, bool kPrefetch, typename E>
static inline __attribute__((always_inline)) void multiply_steps(
    const E* x, int64_t x_stride, const E* const (&weight)[kTileColumns], int64_t depth,
    int64_t ahead, Vector<float> (&sum)[kRows][kTileColumns]) {
  const auto add = [&](const auto& load_from) __attribute__((always_inline)) {
    decltype(load_from(x)) left[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) left[i] = load_from(x + i * x_stride);
#pragma GCC unroll 8
    for (int j = 0; j < kTileColumns; ++j) {
      const auto right = load_from(weight[j]);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) sum[i][j] = multiply_add(left[i], right, sum[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + kStep<E> <= depth; k += kStep<E>) {
    if constexpr (kPrefetch) {
#pragma GCC unroll 8
      for (int j = 0; j < kTileColumns; ++j) __builtin_prefetch(weight[j] + k + ahead, 0, 2);
    }
    add([&](const E* p) __attribute__((always_inline)) { return load_step(p + k); });
  }
  if (k < depth) {
    add([&](const E* p)
            __attribute__((always_inline)) { return load_step_first(p + k, depth - k); });
  }
}

// sums[i * kLinearColumns + j] (+)= <x + i * x_stride, weight[j]> for i < kRows, j < kTileColumns.
// What lies `ahead` elements behind the weights is prefetched, unless that is 0.
template <int kRows, typename E>
static void multiply_tile(const E* x, int64_t x_stride, const E* const (&weight)[kTileColumns],
                          int64_t depth, bool accumulate, float* sums, int64_t ahead) {
  Vector<float> sum[kRows][kTileColumns] = {};
  if (ahead != 0) {
    multiply_steps<kRows, true>(x, x_stride, weight, depth, ahead, sum);
  } else {
    multiply_steps<kRows, false>(x, x_stride, weight, depth, 0, sum);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    TileRow* row = reinterpret_cast<TileRow*>(sums + i * kLinearColumns);
    const TileRow total = sum_lanes(sum[i]);
    *row = accumulate ? *row + total : total;
  }
}

}  // namespace flexvar::FLEXVAR_ISA
