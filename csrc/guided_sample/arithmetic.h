// The arithmetic of guided_sample that CPU and CUDA share; flexvar_ext/reference.py has the same in
// PyTorch, bit for bit. Everything that decides about a token is an integer: order keys, weights,
// sums of weights and the draw, so neither the order of a sum nor the machine matters.
#pragma once

#include <stdint.h>

#include "common/host_device.h"
#include "common/philox.h"

namespace flexvar {

// Keys of logits as signed integers of the same order; NaN counts as -inf, -0 as +0.
constexpr int32_t kInfinityKey = 0x7f800000, kMinusInfinityKey = ~0x7f800000;

FLEXVAR_HOST_DEVICE int32_t order_key(int32_t float_bits) {
  const int32_t magnitude = float_bits & 0x7fffffff;
  const int32_t key = float_bits < 0 ? ~magnitude : magnitude;
  return magnitude > 0x7f800000 ? kMinusInfinityKey : magnitude == 0 ? 0 : key;
}

FLEXVAR_HOST_DEVICE float logit_of_key(int32_t key) {
  return __builtin_bit_cast(float, key < 0 ? ~key | INT32_MIN : key);
}

// With +inf among the logits, those share all the mass: the row becomes zeros there, -inf
// elsewhere.
FLEXVAR_HOST_DEVICE int32_t key_beside_infinity(int32_t key) {
  return key == kInfinityKey ? 0 : kMinusInfinityKey;
}

FLEXVAR_HOST_DEVICE float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// The upper bits of x as a number: as many as the lower five bits of `count` say.
FLEXVAR_HOST_DEVICE uint32_t upper_bits(uint32_t x, uint32_t count) {
#ifdef __CUDA_ARCH__
  return __funnelshift_l(x, 0, count);
#else
  return x >> 1 >> (~count & 31u);
#endif
}

// floor(2^30 * 2^t) with t = log2(e) * (logit - maximum) rounded to multiples of 2^-18, and 2^t to
// within 3e-6 of itself: 2^30 at most, and 0 below 2^-30 of the most likely token's, or of NaN.
// maximum is finite. A sum over 2^33 tokens fits into 63 bits.
FLEXVAR_HOST_DEVICE uint32_t token_weight(float logit, float maximum) {
  const float kLog2E = 0x1.715476p0f;
  // t + 63 is at most 63; in [32, 64) the spacing of floats is the 2^-18 we want, and the bits
  // below 32's leading one count t + 31 in that unit. What is below -31 weighs nothing.
  float shifted = fused_multiply_add(logit - maximum, kLog2E, 63.0f);
  shifted = shifted > 32.0f ? shifted : 32.0f;
  const uint32_t t = __builtin_bit_cast(uint32_t, shifted);
  // 2^(g - 1) for g in [1, 2): from 1 to less than 2 for every one of the 2^18 fractions, so that
  // its mantissa, with the leading 1, is the result in units of 2^-23.
  const float g = __builtin_bit_cast(float, 0x3f800000u + (t & 0x3ffffu) * 32);
  float power = 0x1.b7f730p-7f;
  power = fused_multiply_add(power, g, -0x1.7fd96ap-10f);
  power = fused_multiply_add(power, g, 0x1.5226b4p-3f);
  power = fused_multiply_add(power, g, 0x1.41077ep-2f);
  power = fused_multiply_add(power, g, 0x1.04d2a4p-1f);
  // The last bit of the exponent of [1, 2) is set, so it serves as the leading 1.
  return upper_bits(__builtin_bit_cast(uint32_t, power) << 8, t >> 18);
}

// Tokens are ordered by key (descending), then index. Kept are those with less than `limit` mass
// before them: all with a key above `key`, and the first `ties` of those at it.
struct Threshold {
  int32_t key;
  int64_t ties;
};

// The smallest positive integer that is not below top_p * total: one rounding, the same everywhere.
FLEXVAR_HOST_DEVICE int64_t mass_limit(int64_t total, double top_p) {
  const double product = static_cast<double>(total) * top_p;
  const int64_t floor = static_cast<int64_t>(product);
  const int64_t limit = floor + (static_cast<double>(floor) < product);
  return limit > 0 ? limit : 1;
}

// 64 random bits from one Philox call. Counter: position in the step, step, image id (low word,
// high word); key: seed.
FLEXVAR_HOST_DEVICE uint64_t random_number(int64_t seed, int64_t image_id, int64_t step,
                                           int64_t position) {
  const PhiloxWords random =
      philox4x32({{static_cast<uint32_t>(position), static_cast<uint32_t>(step),
                   static_cast<uint32_t>(image_id),
                   static_cast<uint32_t>(static_cast<uint64_t>(image_id) >> 32)}},
                 static_cast<uint64_t>(seed));
  return uint64_t{random.word[1]} << 32 | random.word[0];
}

// A random number's place in [0, total).
FLEXVAR_HOST_DEVICE int64_t scaled_draw(uint64_t number, int64_t total) {
  return static_cast<int64_t>(
      static_cast<unsigned __int128>(number) * static_cast<uint64_t>(total) >> 64);
}

}  // namespace flexvar
