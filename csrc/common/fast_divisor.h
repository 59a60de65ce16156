// Division of unsigned numbers by one that a launcher knows: three instructions, where a GPU takes
// about fifteen, most of which wait for each other.
#pragma once

#include <cstdint>

#include "common/cuda.cuh"

namespace flexvar {

// After Granlund and Montgomery, "Division by invariant integers using multiplication". Divisor and
// dividends lie below 2^31.
struct FastDivisor {
  unsigned divisor, factor, shift;

  FastDivisor() = default;
  FastDivisor(int64_t divisor) : divisor(static_cast<unsigned>(divisor)), shift(0) {
    while (int64_t{1} << shift < divisor) ++shift;
    factor = static_cast<unsigned>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }

  __device__ __forceinline__ unsigned quotient(unsigned x) const {
    return (__umulhi(x, factor) + x) >> shift;
  }
  __device__ __forceinline__ unsigned remainder(unsigned x) const {
    return x - quotient(x) * divisor;
  }
};

}  // namespace flexvar
