// Storage types of tensors on the CPU and their conversion to and from the type that arithmetic is
// done in. Without branches, so that loops over them vectorise. Only for csrc/<op>/cpu_kernel.cpp:
// everything here belongs to the instruction set it is compiled for.
#pragma once

#include <stdint.h>

namespace flexvar::FLEXVAR_ISA {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(Bfloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t rebiased = bits_of(float_from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return float_from_bits(rebiased | special | (x.bits & 0x8000u) << 16);
}

// Round to nearest, ties to even.
template <typename E, typename T>
E from_float(T x);
template <>
inline float from_float(float x) {
  return x;
}
template <>
inline double from_float(double x) {
  return x;
}
template <>
inline Bfloat16 from_float(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}
template <>
inline Half from_float(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
}

}  // namespace flexvar::FLEXVAR_ISA
