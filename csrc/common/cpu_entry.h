// Entries of the factors of a product (cpu_gemm.h), made of stored elements: 32 bits, a number or,
// where the CPU multiplies such, a pair of bfloat16.
#pragma once

#include "common/cpu_gemm.h"

namespace flexvar::FLEXVAR_ISA {

// What elements of x and the weight are multiplied as, given the element of x.
template <typename X>
struct EntryOf {
  using Type = float;
};
#ifdef __AVX512BF16__
template <>
struct EntryOf<Bfloat16> {
  using Type = BfloatPair;
};
#endif
template <typename Entry>
constexpr int64_t kElementsPerEntry = 1;
#ifdef __AVX512BF16__
template <>
constexpr int64_t kElementsPerEntry<BfloatPair> = 2;
#endif

// A vector of entries from the first `count` elements at p, the rest zero.
template <typename Entry, typename W>
static inline Vector<float> load_entries(const W* p, int64_t count) {
#ifdef __AVX512BF16__
  if constexpr (__is_same(Entry, BfloatPair)) {
    if constexpr (__is_same(W, Bfloat16)) {
      const __mmask32 mask = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
      return (Vector<float>)_mm512_maskz_loadu_epi16(mask, p);
    } else {
      const Vector<float> low = load_first(p, count);
      const Vector<float> high = count > 16 ? load_first(p + 16, count - 16) : Vector<float>{};
      // Denormal numbers become zero, as they do in the products of bfloat16.
      return (Vector<float>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
  }
#endif
  return load_first(p, count);
}

}  // namespace flexvar::FLEXVAR_ISA
