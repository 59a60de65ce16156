// __half and __nv_bfloat16 for the emulation: every operation rounds to nearest even once, as the
// hardware's do. Included by cuda_on_cpu.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace flexvar::emulation {

// IEEE-like 16-bit formats, by their number of mantissa bits (10: half, 7: bfloat16).
template <int kMantissa>
constexpr float decode16(uint16_t bits) {
  if constexpr (kMantissa == 7) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  } else {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    float value;
    if (magnitude >= 0x0f800000u) {  // infinity or NaN
      value = std::bit_cast<float>(magnitude | 0x7f800000u);
    } else {  // the product rebiases the exponent, for subnormal numbers too
      value = std::bit_cast<float>(magnitude) * 0x1p112f;
    }
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }
}

template <int kMantissa>
constexpr uint16_t encode16(double x) {
  constexpr int kExponentBits = 15 - kMantissa, kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr uint16_t kInfinity = ((1u << kExponentBits) - 1) << kMantissa;
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const auto sign = static_cast<uint16_t>((bits >> 63) << 15);
  const uint64_t magnitude = bits & 0x7fffffffffffffffu;
  if (magnitude > 0x7ff0000000000000u) return 0x7fff;  // CUDA's canonical NaN
  const int exponent = static_cast<int>(magnitude >> 52) - 1023;
  if (exponent > kBias) return sign | kInfinity;
  if (exponent < -kBias - kMantissa) return sign;  // below half of the smallest subnormal number
  // Drop so many bits that the result counts units in the last place of the target.
  const int drop = 52 - kMantissa + (exponent < 1 - kBias ? 1 - kBias - exponent : 0);
  const uint64_t significand = (magnitude & 0xfffffffffffffu) | 0x10000000000000u;
  uint64_t kept = significand >> drop;
  const uint64_t rest = significand & ((uint64_t{1} << drop) - 1), tie = uint64_t{1} << (drop - 1);
  if (rest > tie || (rest == tie && (kept & 1) != 0)) ++kept;
  // A carry out of the significand moves into the exponent by itself.
  const uint64_t base = exponent < 1 - kBias ? 0 : static_cast<uint64_t>(exponent + kBias - 1);
  return static_cast<uint16_t>(sign | ((base << kMantissa) + kept));
}

template <int kMantissa>
struct Float16 {
  uint16_t bits;

  Float16() = default;
  constexpr Float16(double x) : bits(encode16<kMantissa>(x)) {}
  constexpr Float16(float x) : Float16(static_cast<double>(x)) {}
  constexpr Float16(int x) : Float16(static_cast<double>(x)) {}
  constexpr operator float() const { return decode16<kMantissa>(bits); }

  // Sums, products and quotients of two values are exact enough in double to be rounded once.
  friend constexpr Float16 operator+(Float16 a, Float16 b) { return {double(float(a)) + float(b)}; }
  friend constexpr Float16 operator-(Float16 a, Float16 b) { return {double(float(a)) - float(b)}; }
  friend constexpr Float16 operator*(Float16 a, Float16 b) { return {double(float(a)) * float(b)}; }
  friend constexpr Float16 operator/(Float16 a, Float16 b) { return {double(float(a)) / float(b)}; }
  friend constexpr Float16 operator-(Float16 a) {
    a.bits ^= 0x8000;
    return a;
  }
  friend constexpr bool operator==(Float16 a, Float16 b) { return float(a) == float(b); }
  friend constexpr bool operator<(Float16 a, Float16 b) { return float(a) < float(b); }
  friend constexpr bool operator>(Float16 a, Float16 b) { return float(a) > float(b); }
  friend constexpr bool operator<=(Float16 a, Float16 b) { return float(a) <= float(b); }
  friend constexpr bool operator>=(Float16 a, Float16 b) { return float(a) >= float(b); }
  Float16& operator+=(Float16 other) { return *this = *this + other; }
  Float16& operator-=(Float16 other) { return *this = *this - other; }
  Float16& operator*=(Float16 other) { return *this = *this * other; }
  Float16& operator/=(Float16 other) { return *this = *this / other; }
};

// The greatest number of the format that is not above x.
template <class T>
constexpr T encode16_down(float x) {
  T rounded = x;
  if (float(rounded) > x) {
    const bool is_zero = (rounded.bits & 0x7fff) == 0, is_negative = (rounded.bits & 0x8000) != 0;
    rounded.bits = static_cast<uint16_t>(is_zero       ? 0x8001
                                         : is_negative ? rounded.bits + 1
                                                       : rounded.bits - 1);
  }
  return rounded;
}

template <class T>
struct alignas(4) Pair16 {
  T x, y;

  friend Pair16 operator+(Pair16 a, Pair16 b) { return {a.x + b.x, a.y + b.y}; }
  friend Pair16 operator-(Pair16 a, Pair16 b) { return {a.x - b.x, a.y - b.y}; }
  friend Pair16 operator*(Pair16 a, Pair16 b) { return {a.x * b.x, a.y * b.y}; }
};

}  // namespace flexvar::emulation

using __half = flexvar::emulation::Float16<10>;
using __nv_bfloat16 = flexvar::emulation::Float16<7>;
using __half2 = flexvar::emulation::Pair16<__half>;
using __nv_bfloat162 = flexvar::emulation::Pair16<__nv_bfloat16>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// --- Conversions, with the names of cuda_fp16.h and cuda_bf16.h --------------------------------

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __float2half_rd(float x) { return flexvar::emulation::encode16_down<__half>(x); }
inline __half __double2half(double x) { return x; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return std::bit_cast<__half>(bits); }

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rd(float x) {
  return flexvar::emulation::encode16_down<__nv_bfloat16>(x);
}
inline __nv_bfloat16 __double2bfloat16(double x) { return x; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
  return std::bit_cast<__nv_bfloat16>(bits);
}

// --- Arithmetic --------------------------------------------------------------------------------

namespace flexvar::emulation {

template <class T>
concept IsFloat16 = std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;

// a * b is exact in double; its sum with c is rounded to odd, so that the rounding to 16 bits is
// the only one.
template <IsFloat16 T>
T fma16(T a, T b, T c) {
  const double product = double(float(a)) * float(b), addend = float(c);
  const double sum = product + addend;
  const double error =
      std::fabs(product) >= std::fabs(addend) ? addend - (sum - product) : product - (sum - addend);
  if (error == 0 || !std::isfinite(sum)) return {sum};
  const auto bits = std::bit_cast<uint64_t>(sum);
  if ((bits & 1) != 0) return {sum};
  const bool away_from_zero = (error > 0) == (sum > 0);
  return {std::bit_cast<double>(away_from_zero ? bits + 1 : bits - 1)};
}

}  // namespace flexvar::emulation

template <flexvar::emulation::IsFloat16 T>
T __hadd(T a, T b) {
  return a + b;
}
template <flexvar::emulation::IsFloat16 T>
T __hsub(T a, T b) {
  return a - b;
}
template <flexvar::emulation::IsFloat16 T>
T __hmul(T a, T b) {
  return a * b;
}
template <flexvar::emulation::IsFloat16 T>
T __hdiv(T a, T b) {
  return a / b;
}
template <flexvar::emulation::IsFloat16 T>
T __hfma(T a, T b, T c) {
  return flexvar::emulation::fma16(a, b, c);
}
template <flexvar::emulation::IsFloat16 T>
T __hneg(T a) {
  return -a;
}
template <flexvar::emulation::IsFloat16 T>
T __habs(T a) {
  a.bits &= 0x7fff;
  return a;
}
template <flexvar::emulation::IsFloat16 T>
T __hmax(T a, T b) {
  return {std::fmax(float(a), float(b))};
}
template <flexvar::emulation::IsFloat16 T>
T __hmin(T a, T b) {
  return {std::fmin(float(a), float(b))};
}
template <flexvar::emulation::IsFloat16 T>
bool __hisnan(T a) {
  return std::isnan(float(a));
}
template <flexvar::emulation::IsFloat16 T>
bool __heq(T a, T b) {
  return a == b;
}
template <flexvar::emulation::IsFloat16 T>
bool __hlt(T a, T b) {
  return a < b;
}
template <flexvar::emulation::IsFloat16 T>
bool __hgt(T a, T b) {
  return a > b;
}
template <class T>
flexvar::emulation::Pair16<T> __hadd2(flexvar::emulation::Pair16<T> a,
                                      flexvar::emulation::Pair16<T> b) {
  return a + b;
}
template <class T>
flexvar::emulation::Pair16<T> __hsub2(flexvar::emulation::Pair16<T> a,
                                      flexvar::emulation::Pair16<T> b) {
  return a - b;
}
template <class T>
flexvar::emulation::Pair16<T> __hmul2(flexvar::emulation::Pair16<T> a,
                                      flexvar::emulation::Pair16<T> b) {
  return a * b;
}
template <class T>
flexvar::emulation::Pair16<T> __hfma2(flexvar::emulation::Pair16<T> a,
                                      flexvar::emulation::Pair16<T> b,
                                      flexvar::emulation::Pair16<T> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <class T>
flexvar::emulation::Pair16<T> __hmax2(flexvar::emulation::Pair16<T> a,
                                      flexvar::emulation::Pair16<T> b) {
  return {__hmax(a.x, b.x), __hmax(a.y, b.y)};
}
template <class T>
flexvar::emulation::Pair16<T> __hmin2(flexvar::emulation::Pair16<T> a,
                                      flexvar::emulation::Pair16<T> b) {
  return {__hmin(a.x, b.x), __hmin(a.y, b.y)};
}
