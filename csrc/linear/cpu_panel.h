// Panels of the weight as the product reads them: entry k of the depth of every column side by
// side.
#pragma once

#include "common/cpu_entry.h"
#include "linear/cpu_kernel.h"

namespace flexvar::FLEXVAR_ISA {

constexpr int64_t kPanelColumns = kRegisterColumns * kFloatLanes;
static_assert(kPanelColumns <= kLinearColumns && kLinearColumns % kPanelColumns == 0);

constexpr int kGroups = kFloatLanes / 4;  // of 128 bits in a vector

// Group g: the four entries at rows[g].
template <typename Entry, typename W>
static inline __attribute__((always_inline)) Vector<float> load_groups(
    const W* const (&rows)[kGroups]) {
#if FLEXVAR_VECTOR_BYTES == 64
  if constexpr (sizeof(W) == 4 && kElementsPerEntry<Entry> == 1) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps((const float*)rows[0]));
    v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps((const float*)rows[1]));
    v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps((const float*)rows[2]));
    return (Vector<float>)_mm512_mask_broadcast_f32x4(v, 0xf000,
                                                      _mm_loadu_ps((const float*)rows[3]));
  }
#elif FLEXVAR_VECTOR_BYTES == 32
  if constexpr (sizeof(W) == 4) {
    return (Vector<float>)_mm256_set_m128(_mm_loadu_ps((const float*)rows[1]),
                                          _mm_loadu_ps((const float*)rows[0]));
  } else {
    const __m128i eight = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)rows[0]),
                                             _mm_loadl_epi64((const __m128i*)rows[1]));
    if constexpr (__is_same(W, Half)) return (Vector<float>)_mm256_cvtph_ps(eight);
    return (Vector<float>)((Bits32)_mm256_cvtepu16_epi32(eight) << 16);
  }
#endif
#ifdef __AVX512BF16__
  if constexpr (__is_same(Entry, BfloatPair) && sizeof(W) == 4) {
    const auto both = [](const W* low, const W* high) __attribute__((always_inline)) {
      return _mm512_mask_broadcast_f32x8(_mm512_castps256_ps512(_mm256_loadu_ps((const float*)low)),
                                         0xff00, _mm256_loadu_ps((const float*)high));
    };
    // Denormal numbers become zero, as they do in the products of bfloat16.
    return (Vector<float>)_mm512_cvtne2ps_pbh(both(rows[2], rows[3]), both(rows[0], rows[1]));
  }
  if constexpr (__is_same(Entry, BfloatPair)) {
    return load_groups<float>(reinterpret_cast<const float* const(&)[kGroups]>(rows));
  }
#endif
  float entries[kFloatLanes];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < 4; ++i) entries[4 * g + i] = to_float(rows[g][i]);
  }
  return load(entries);
}

// Transposes the squares of four numbers that stand in the groups of four vectors.
static inline void transpose_groups(Vector<float> (&v)[4]) {
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
  const Vector<float> a = low(v[0], v[2]), b = high(v[0], v[2]);
  const Vector<float> c = low(v[1], v[3]), d = high(v[1], v[3]);
  v[0] = low(a, c);
  v[1] = high(a, c);
  v[2] = low(b, d);
  v[3] = high(b, d);
}

constexpr int kSquares = 4;  // side by side: a row's cache line is read at one go
template <typename Entry>
constexpr int64_t kPackStep = kSquares * 4 * kElementsPerEntry<Entry>;  // elements of a row

// As many rows as a vector has entries, kPackStep elements of each, to as many columns at `place`.
// `quads[g]` is where row 4 g is, and rows lie `stride` apart within such a quad.
template <typename Entry, typename W>
static inline __attribute__((always_inline)) void pack_squares(float* place,
                                                               const W* const (&quads)[kGroups],
                                                               int64_t stride) {
  constexpr int64_t group = 4 * kElementsPerEntry<Entry>;
  Vector<float> square[kSquares][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
    for (int s = 0; s < kSquares; ++s) {
      const W* rows[kGroups];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) rows[g] = quads[g] + j * stride + s * group;
      square[s][j] = load_groups<Entry>(rows);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kSquares; ++s) {
    transpose_groups(square[s]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(place + j * kPanelColumns, square[s][j]);
    place += 4 * kPanelColumns;
  }
}

// Rows of the weight, `count` elements each, to columns of the panel [entries, kPanelColumns].
// Columns behind the last row are zero, and nobody reads them.
template <typename Entry, typename W>
static void pack_panel(float* panel, const W* weight, int64_t stride, int64_t rows, int64_t count) {
  constexpr int64_t step = kPackStep<Entry>;
  for (int64_t first = 0; first < rows; first += kFloatLanes) {
    const int64_t rows_left = rows - first;
    float* place = panel + first;
    int64_t k = 0;
    const W* quads[kGroups];
    if (rows_left >= kFloatLanes) {
      for (int g = 0; g < kGroups; ++g) quads[g] = weight + (first + 4 * g) * stride;
      for (; k + step <= count; k += step) {
        pack_squares<Entry, W>(place, quads, stride);
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) quads[g] += step;
        place += kSquares * 4 * kPanelColumns;
      }
    }
    if (k >= count) continue;
    const int64_t copied = rows_left < kFloatLanes ? rows_left : kFloatLanes;
    W copy[kFloatLanes][step] = {};  // filled up with zeros
    for (int g = 0; g < kGroups; ++g) quads[g] = copy[4 * g];
    for (; k < count; k += step) {
      for (int64_t i = 0; i < copied; ++i) {
        const W* const row = weight + (first + i) * stride + k;
        for (int64_t j = 0; j < step; ++j) copy[i][j] = j < count - k ? row[j] : W{};
      }
      pack_squares<Entry, W>(place, quads, step);
      place += kSquares * 4 * kPanelColumns;
    }
  }
}

}  // namespace flexvar::FLEXVAR_ISA
