// Vectors of float or double for the CPU kernels, in the width of the instruction
// set that a file is compiled for, with loads and stores that convert from and to stored elements.
#pragma once

#include <stdint.h>

#include "common/cpu_element.h"

#ifdef __AVX512F__
#include <immintrin.h>
#define FLEXVAR_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define FLEXVAR_VECTOR_BYTES 32
#else
#define FLEXVAR_VECTOR_BYTES 16
#endif

namespace flexvar::FLEXVAR_ISA {

template <typename Real>
struct VectorOf {
  typedef Real Type __attribute__((vector_size(FLEXVAR_VECTOR_BYTES)));
  static constexpr int64_t lanes = FLEXVAR_VECTOR_BYTES / sizeof(Real);
};
template <typename Real>
using Vector = typename VectorOf<Real>::Type;

constexpr int64_t kFloatLanes = VectorOf<float>::lanes;
typedef uint16_t Bits16 __attribute__((vector_size(FLEXVAR_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(FLEXVAR_VECTOR_BYTES)));

// --- float and double --------------------------------------------------------------------------
static inline Vector<float> load(const float* p) {
  Vector<float> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
static inline Vector<double> load(const double* p) {
  Vector<double> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
static inline void store(float* p, Vector<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
static inline void store(double* p, Vector<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }

// a > b ? a : b, so b where one is NaN. GCC compares and blends.
static inline Vector<float> larger(Vector<float> a, Vector<float> b) {
#if FLEXVAR_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif FLEXVAR_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static inline Vector<double> larger(Vector<double> a, Vector<double> b) { return a > b ? a : b; }

// GCC takes the root of one lane after the other.
static inline Vector<float> square_roots(Vector<float> v) {
#if FLEXVAR_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif FLEXVAR_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_sqrt_ps((__m256)v);
#else
  for (int64_t i = 0; i < kFloatLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
static inline Vector<double> square_roots(Vector<double> v) {
#if FLEXVAR_VECTOR_BYTES == 64
  return (Vector<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif FLEXVAR_VECTOR_BYTES == 32
  return (Vector<double>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int64_t i = 0; i < VectorOf<double>::lanes; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// --- float16 (GCC converts vectors of it one by one, hence the intrinsics, and
// warns of the unmasked ones at 512 bits) ----------------------
static inline Vector<float> load(const Half* p) {
#if FLEXVAR_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif FLEXVAR_VECTOR_BYTES == 32
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vector<float> v;
  for (int64_t i = 0; i < kFloatLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
static inline void store(Half* p, Vector<float> v) {
#if FLEXVAR_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif FLEXVAR_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < kFloatLanes; ++i) p[i] = from_float<Half>(v[i]);
#endif
}

// --- bfloat16: the upper half of a float; stored rounded to nearest even, NaN stays NaN ---------
static inline Vector<float> load(const Bfloat16* p) {
#if FLEXVAR_VECTOR_BYTES == 64  // GCC converts it in halves
  const __m256i bits = _mm256_loadu_si256((const __m256i*)p);
  return (Vector<float>)((Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, bits) << 16);
#elif FLEXVAR_VECTOR_BYTES == 32  // likewise
  const __m128i bits = _mm_loadu_si128((const __m128i*)p);
  return (Vector<float>)((Bits32)_mm256_cvtepu16_epi32(bits) << 16);
#else
  Bits16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return (Vector<float>)(__builtin_convertvector(bits, Bits32) << 16);
#endif
}
static inline void store(Bfloat16* p, Vector<float> v) {
  const Bits32 bits = (Bits32)v;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 upper = v == v ? rounded : (bits >> 16) | 0x40;
#if FLEXVAR_VECTOR_BYTES == 32  // GCC masks and permutes
  const __m128i low = _mm256_castsi256_si128((__m256i)upper);
  const __m128i high = _mm256_extracti128_si256((__m256i)upper, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
#else
  const Bits16 result = __builtin_convertvector(upper, Bits16);
  __builtin_memcpy(p, &result, sizeof(result));
#endif
}

// The first n elements of a vector, the rest zero. n may exceed the lanes.
template <typename T>
static inline auto load_first(const T* p, int64_t n) {
  constexpr int64_t lanes = sizeof(T) == 8 ? VectorOf<double>::lanes : kFloatLanes;
  if (n >= lanes) return load(p);
  T full[lanes] = {};
  for (int64_t i = 0; i < n; ++i) full[i] = p[i];
  return load(full);
}
template <typename T, typename V>
static inline void store_first(T* p, V v, int64_t n) {
  constexpr int64_t lanes = sizeof(T) == 8 ? VectorOf<double>::lanes : kFloatLanes;
  if (n >= lanes) return store(p, v);
  T full[lanes];
  store(full, v);
  for (int64_t i = 0; i < n; ++i) p[i] = full[i];
}

// --- transposition of a square of vectors -------------------------------------------------------
// Interleaves the lower (upper) halves of a and b: a0 b0 a1 b1 …
template <typename V>
static inline V interleave_low(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 2) return __builtin_shufflevector(a, b, 0, 2);
  if constexpr (lanes == 4) return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  if constexpr (lanes == 8) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  if constexpr (lanes == 16)
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
template <typename V>
static inline V interleave_high(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 2) return __builtin_shufflevector(a, b, 1, 3);
  if constexpr (lanes == 4) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  if constexpr (lanes == 8) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  if constexpr (lanes == 16)
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
}

// rows[i][j] <-> rows[j][i]: log2(lanes) perfect shuffles of the whole square.
template <typename Real>
static inline void transpose(Vector<Real> (&rows)[VectorOf<Real>::lanes]) {
  constexpr int64_t lanes = VectorOf<Real>::lanes;
#pragma GCC unroll 4
  for (int64_t stage = 1; stage < lanes; stage *= 2) {
    Vector<Real> shuffled[lanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes / 2; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + lanes / 2]);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) rows[i] = shuffled[i];
  }
}

}  // namespace flexvar::FLEXVAR_ISA
