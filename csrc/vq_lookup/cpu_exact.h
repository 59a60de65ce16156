// The arithmetic that decides which code is nearest, and what rows it decides between: the same
// bits with every instruction set and on every device. A product of two floats is exact in double,
// so contraction to fma changes nothing; the sums go to eight partial sums by component, which are
// added as ((0+4)+(2+6)) + ((1+5)+(3+7)).
#pragma once

// Vectors wider than the instruction set's registers are passed between inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "common/cpu_vector.h"
#include "vq_lookup/cpu_kernel.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

typedef double Double8 __attribute__((vector_size(64)));
typedef float UnalignedFloat8 __attribute__((vector_size(32), aligned(4), may_alias));

constexpr float kInfinity = __builtin_inff();

inline double sum(Double8 s) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// Eight components from `p`, those from `count` on zero, times `scale` and rounded to fp32.
inline Double8 load_scaled(const float* p, int64_t count, double scale) {
#if FLEXVAR_VECTOR_BYTES == 64  // GCC converts in halves
  const __mmask8 mask = count >= 8 ? 0xff : (1u << count) - 1;
  const auto widen = [](__m256 v) { return (Double8)_mm512_maskz_cvtps_pd(0xff, v); };
  const Double8 values = widen(_mm256_maskz_loadu_ps(mask, p));
  if (scale == 1.0) return values;
  return widen(_mm512_maskz_cvtpd_ps(0xff, (__m512d)(values * scale)));
#else
  Double8 values = {};
  if (count >= 8) {
    values = __builtin_convertvector(*reinterpret_cast<const UnalignedFloat8*>(p), Double8);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  }
  if (scale == 1.0) return values;
  typedef float Float8 __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(values * scale, Float8), Double8);
#endif
}

inline double squared_norm(const float* row, int64_t dim, double scale) {
  Double8 sums = {};
  for (int64_t c = 0; c < dim; c += 8) {
    const Double8 values = load_scaled(row + c, dim - c, scale);
    sums += values * values;
  }
  return sum(sums);
}

template <typename Doubles>
inline Doubles square_roots(const Doubles& v) {
#if FLEXVAR_VECTOR_BYTES == 64
  return (Doubles)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#else
  Doubles roots;
  for (size_t i = 0; i < sizeof(v) / sizeof(double); ++i) roots[i] = __builtin_sqrt(v[i]);
  return roots;
#endif
}

// The factors of rows with these squared norms: 1 / max(|row|, 1e-12), or 1 without normalisation;
// 0 for a row that holds a NaN or an infinity (a sum of squares of finite floats does not overflow
// in double).
template <typename Doubles>
inline Doubles row_scales(const Doubles& squared, bool normalize) {
  Doubles scales = Doubles{} + 1.0;
  if (normalize) {
    const Doubles norms = square_roots(squared);
    scales = 1.0 / (norms > 1e-12 ? norms : 1e-12);
  }
  return squared < static_cast<double>(__builtin_inf()) ? scales : 0.0;
}

inline void transpose_eight(Double8 (&rows)[8]) {
#pragma GCC unroll 3
  for (int stage = 0; stage < 3; ++stage) {
    Double8 shuffled[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + 4]);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + 4]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = shuffled[i];
  }
}

// The sum of each row, a row to a lane.
inline Double8 sum_rows(Double8 (&s)[8]) {
  transpose_eight(s);
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// The factors of eight rows of the codebook, a row to a lane.
inline Double8 scales_of_rows(const float* const (&rows)[8], int64_t dim, bool normalize) {
  Double8 squares[8] = {};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    for (int64_t c = 0; c < dim; c += 8) {
      const Double8 row = load_scaled(rows[i] + c, dim - c, 1.0);
      squares[i] += row * row;
    }
  }
  const Double8 squared = sum_rows(squares);
  return row_scales(squared, normalize);
}

// x·e - |e|²/2 of eight codes given by their codebook rows and factors, a code to a lane; NaN where
// a row is not finite. x is padded with zeros.
inline Double8 exact_scores(const float* x, const float* const (&rows)[8], const Double8& scales,
                            int64_t dim) {
  Double8 dots[8] = {}, squares[8] = {};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    for (int64_t c = 0; c < dim; c += 8) {
      const Double8 e = load_scaled(rows[i] + c, dim - c, scales[i]);
      dots[i] += e * load_scaled(x + c, 8, 1.0);
      squares[i] += e * e;
    }
  }
  const Double8 scores = sum_rows(dots) - 0.5 * sum_rows(squares);
  return scales != 0.0 ? scores : static_cast<double>(__builtin_nan(""));
}

// Row n of the resampled latents, summed in double and rounded once.
void resample_row(const VqLookupParams& params, int64_t n, float* out) {
  const int64_t image = n / params.pyramid->num_tokens, token = n % params.pyramid->num_tokens;
  const VqScale* scale = params.pyramid->scales + params.pyramid->num_scales - 1;
  while (scale->first_token > token) --scale;
  const ResampleTaps<float>&rows = scale->rows, &columns = scale->columns;
  const int64_t y = (token - scale->first_token) / columns.out_size;
  const int64_t x = (token - scale->first_token) % columns.out_size;
  const int64_t dim = params.dim;
  const float* latent = params.latents + image * rows.in_size * columns.in_size * dim;
  for (int64_t c = 0; c < dim; c += 8) {
    Double8 sums = {};
    for (int64_t i = 0; i < rows.count[y]; ++i) {
      const float* line =
          latent + ((rows.start[y] + i) * columns.in_size + columns.start[x]) * dim + c;
      const float row_weight = rows.weights[y * rows.stride + i];
      for (int64_t j = 0; j < columns.count[x]; ++j) {
        // The weight in fp32, so that the product is exact in double.
        const float weight = row_weight * columns.weights[x * columns.stride + j];
        sums += static_cast<double>(weight) * load_scaled(line + j * dim, dim - c, 1.0);
      }
    }
    for (int64_t i = 0; i < 8 && c + i < dim; ++i) out[c + i] = static_cast<float>(sums[i]);
  }
}

// The code among `count` from `first` on (eights; those behind the codebook are left out) whose
// exact score with the query x beats that of `best`; of equal ones the lowest.
struct Best {
  double score = -static_cast<double>(kInfinity);
  int64_t code = 0;
};
inline void find_best(const VqLookupParams& params, const float* x, int64_t first, int64_t count,
                      Best& best) {
  const int64_t end = first + count < params.num_codes ? first + count : params.num_codes;
  for (; first < end; first += 8) {
    const float* rows[8];
    for (int64_t i = 0; i < 8; ++i) {
      rows[i] = params.codebook + (first + i < end ? first + i : first) * params.dim;
    }
    Double8 scales;
    if (params.scales != nullptr) {
      __builtin_memcpy(&scales, params.scales + first, sizeof(scales));
    } else {
      scales = scales_of_rows(rows, params.dim, params.normalize);
    }
    const Double8 scores = exact_scores(x, rows, scales, params.dim);
    for (int64_t i = 0; i < 8 && first + i < end; ++i) {
      if (scores[i] > best.score || (scores[i] == best.score && first + i < best.code)) {
        best = {scores[i], first + i};
      }
    }
  }
}

// Row n of the queries, normalised if asked for, padded with zeros.
inline void prepare_latent(const VqLookupParams& params, int64_t n) {
  const int64_t dim = params.dim, padded = params.padded_dim();
  float* out = params.queries + n * padded;
  for (int64_t c = 0; c < padded; ++c) out[c] = 0;
  if (n >= params.num_latents) return;
  const float* row = params.latents + n * dim;
  if (params.pyramid != nullptr) {
    resample_row(params, n, out);
    row = out;
  }
  const Double8 squared = Double8{} + squared_norm(row, dim, 1.0);
  const double scale = row_scales(squared, params.normalize)[0];
  for (int64_t c = 0; c < dim; ++c) {
    out[c] = scale != 0.0 ? static_cast<float>(row[c] * scale) : 0.0f;
  }
  params.query_norms[n] =
      scale != 0.0 ? __builtin_sqrt(squared_norm(out, dim, 1.0)) : __builtin_nan("");
}

}  // namespace
}  // namespace flexvar::FLEXVAR_ISA
