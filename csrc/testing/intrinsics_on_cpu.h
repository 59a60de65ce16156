// CUDA's vector types and per-thread intrinsics in plain C++. Included by cuda_on_cpu.h.
#pragma once

#include <math.h>  // isnan without std::, as CUDA has it

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

// --- Vector types ------------------------------------------------------------------------------

#define FLEXVAR_VECTOR_TYPES(name, type)                                                      \
  struct name##1 { type x; };                                                                 \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                           \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##1 make_##name##1(type x) { return {x}; }                                       \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

FLEXVAR_VECTOR_TYPES(char, signed char)
FLEXVAR_VECTOR_TYPES(uchar, unsigned char)
FLEXVAR_VECTOR_TYPES(short, short)
FLEXVAR_VECTOR_TYPES(ushort, unsigned short)
FLEXVAR_VECTOR_TYPES(int, int)
FLEXVAR_VECTOR_TYPES(uint, unsigned int)
FLEXVAR_VECTOR_TYPES(longlong, long long)
FLEXVAR_VECTOR_TYPES(ulonglong, unsigned long long)
FLEXVAR_VECTOR_TYPES(float, float)
FLEXVAR_VECTOR_TYPES(double, double)
#undef FLEXVAR_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// --- Integers and bits -------------------------------------------------------------------------

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= ((x >> i) & 1u) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<long long>(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline long long __mul64hi(long long a, long long b) {
  return static_cast<long long>((static_cast<__int128>(a) * b) >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((((static_cast<uint64_t>(high) << 32) | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (static_cast<uint64_t>(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  }
  return result;
}

// --- Bit casts and conversions -----------------------------------------------------------------

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

namespace flexvar::emulation {

// Float to integer as the GPU does it: NaN gives 0, values outside the range its nearest end.
template <class Integer>
Integer to_integer(double x) {
  if (std::isnan(x)) return 0;
  constexpr auto kLowest = std::numeric_limits<Integer>::min();
  constexpr auto kHighest = std::numeric_limits<Integer>::max();
  if (x <= static_cast<double>(kLowest)) return kLowest;
  if (x >= static_cast<double>(kHighest)) return kHighest;
  return static_cast<Integer>(x);
}

}  // namespace flexvar::emulation

#define FLEXVAR_FLOAT_TO_INTEGER(name, Integer)                                 \
  inline Integer __float2##name##_rn(float x) {                                 \
    return flexvar::emulation::to_integer<Integer>(std::nearbyint(x));          \
  }                                                                             \
  inline Integer __float2##name##_rz(float x) {                                 \
    return flexvar::emulation::to_integer<Integer>(std::trunc(x));              \
  }                                                                             \
  inline Integer __float2##name##_rd(float x) {                                 \
    return flexvar::emulation::to_integer<Integer>(std::floor(x));              \
  }                                                                             \
  inline Integer __float2##name##_ru(float x) {                                 \
    return flexvar::emulation::to_integer<Integer>(std::ceil(x));               \
  }                                                                             \
  inline Integer __double2##name##_rn(double x) {                               \
    return flexvar::emulation::to_integer<Integer>(std::nearbyint(x));          \
  }                                                                             \
  inline Integer __double2##name##_rz(double x) {                               \
    return flexvar::emulation::to_integer<Integer>(std::trunc(x));              \
  }                                                                             \
  inline float __##name##2float_rn(Integer x) { return static_cast<float>(x); } \
  inline double __##name##2double_rn(Integer x) { return static_cast<double>(x); }

FLEXVAR_FLOAT_TO_INTEGER(int, int)
FLEXVAR_FLOAT_TO_INTEGER(uint, unsigned)
FLEXVAR_FLOAT_TO_INTEGER(ll, long long)
FLEXVAR_FLOAT_TO_INTEGER(ull, unsigned long long)
#undef FLEXVAR_FLOAT_TO_INTEGER
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// --- Arithmetic: nvcc's fast versions are the accurate ones here -------------------------------

// glibc declares some of these names itself without defining them, hence macros.
#define __expf(x) std::exp(static_cast<float>(x))
#define __exp10f(x) std::pow(10.0f, static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
#define __log10f(x) std::log10(static_cast<float>(x))
#define __powf(x, y) std::pow(static_cast<float>(x), static_cast<float>(y))
#define __sinf(x) std::sin(static_cast<float>(x))
#define __cosf(x) std::cos(static_cast<float>(x))
#define __tanf(x) std::tan(static_cast<float>(x))

inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
