// Tiles of bfloat16 as the CPU multiplies them: pairs that stand side by side along the sum, 32
// bits each. Products are exact and sums are held in float32; denormal numbers count as zero.
#pragma once

#include "scale_attention/cpu_tiles.h"

namespace flexvar::FLEXVAR_ISA {

// How tiles are packed and multiplied, given the type of arithmetic and the element.
template <typename T, typename E>
struct Packing {
  using Entry = T;  // of the left factor
  static constexpr bool pairs = false;
};

#ifdef __AVX512BF16__
template <>
struct Packing<float, Bfloat16> {
  using Entry = BfloatPair;
  static constexpr bool pairs = true;
};

// Rows [begin, end) of [tokens, dim] to [tokens, dim / 2] pairs along the rows.
static inline void pack_row_pairs(float* packed, HeadRows<Bfloat16> rows, int64_t begin,
                                  int64_t end, int64_t dim) {
  for (int64_t t = begin; t < end; ++t, packed += dim / 2) {
    __builtin_memcpy(packed, rows.data + t * rows.stride, dim * sizeof(Bfloat16));
  }
}

// Rows [begin, end) to [tokens / 2, dim] pairs of one column's entries in two rows; `begin` is
// even. A last row without a partner gets zeros.
static inline void pack_column_pairs(float* packed, HeadRows<Bfloat16> rows, int64_t begin,
                                     int64_t end, int64_t dim) {
  for (int64_t t = begin; t < end; t += 2, packed += dim) {
    const Bfloat16* low = rows.data + t * rows.stride;
    for (int64_t d = 0; d < dim; d += kFloatLanes) {
      // A bfloat16 as a float is its bits and 16 zeros below.
      const Bits32 first = (Bits32)load(low + d) >> 16;
      const Bits32 second = t + 1 < end ? (Bits32)load(low + rows.stride + d) : Bits32{};
      store(packed + d, (Vector<float>)(first | second));
    }
  }
}

// Of pairs, with the sign turned if asked for.
static inline void transpose_pairs(float* transposed, const float* packed, int64_t count,
                                   int64_t dim, bool negate) {
  const uint32_t sign = negate ? 0x80008000u : 0;
  transpose_tile(transposed, packed, count, dim / 2,
                 [&](Vector<float> v) { return (Vector<float>)((Bits32)v ^ sign); });
}

// In place: rows 2n and 2n + 1 of [keys, kTile], rounded, to row n of pairs. An odd last row is
// paired with zeros.
static inline void pair_rows(float* scores, int64_t keys, int64_t vectors) {
  const auto rounded = [](const float* p) {
    return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff,
                                               (__m256i)_mm512_cvtneps_pbh((__m512)load(p)));
  };
  for (int64_t n = 0; n < keys; n += 2) {
    for (int64_t j = 0; j < vectors * kFloatLanes; j += kFloatLanes) {
      const float* row = scores + n * kTile + j;
      const Bits32 second = n + 1 < keys ? rounded(row + kTile) << 16 : Bits32{};
      store(scores + n / 2 * kTile + j, (Vector<float>)(rounded(row) | second));
    }
  }
}
#endif

}  // namespace flexvar::FLEXVAR_ISA
