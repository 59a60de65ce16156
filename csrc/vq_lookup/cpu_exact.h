// The arithmetic that decides which code is nearest, and what rows it decides between: the same
// bits with every instruction set and on every device. A product of two floats is exact in double,
// so contraction to fma changes nothing; the sums go to eight partial sums by component, which are
// added as ((0+4)+(2+6)) + ((1+5)+(3+7)).
#pragma once

#include "common/cpu_vector.h"
#include "vq_lookup/cpu_kernel.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Eight components of a row, or a number of each of eight rows.
struct Eight {
  static constexpr int64_t kLanes = VectorOf<double>::lanes;
  static constexpr int64_t kParts = 8 / kLanes;
  Vector<double> part[kParts];
};

inline void add_products(Eight& sums, const Eight& a, const Eight& b) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < Eight::kParts; ++i) sums.part[i] += a.part[i] * b.part[i];
}

inline double sum(const Eight& s) {
  double lanes[8];
#pragma GCC unroll 4
  for (int64_t i = 0; i < Eight::kParts; ++i) store(lanes + i * Eight::kLanes, s.part[i]);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

#if FLEXVAR_VECTOR_BYTES == 64  // GCC converts in halves
typedef __m256 Floats;
inline Vector<double> widen(Floats v) { return (Vector<double>)_mm512_maskz_cvtps_pd(0xff, v); }
inline Floats narrow(Vector<double> v) { return _mm512_maskz_cvtpd_ps(0xff, (__m512d)v); }
#elif FLEXVAR_VECTOR_BYTES == 32  // likewise
typedef __m128 Floats;
inline Vector<double> widen(Floats v) { return (Vector<double>)_mm256_cvtps_pd(v); }
inline Floats narrow(Vector<double> v) { return _mm256_cvtpd_ps((__m256d)v); }
#else
typedef float Floats __attribute__((vector_size(FLEXVAR_VECTOR_BYTES / 2)));
inline Vector<double> widen(Floats v) { return __builtin_convertvector(v, Vector<double>); }
inline Floats narrow(Vector<double> v) { return __builtin_convertvector(v, Floats); }
#endif

// Eight components from `p`, those from `count` on zero, times `scale` and rounded to fp32.
inline Eight load_scaled(const float* p, int64_t count, double scale) {
  Floats values[Eight::kParts];
#if FLEXVAR_VECTOR_BYTES == 64
  values[0] = _mm256_maskz_loadu_ps(count >= 8 ? 0xff : (1u << count) - 1, p);
#else
  float some[8] = {};
  if (count < 8) {
    for (int64_t i = 0; i < count; ++i) some[i] = p[i];
    p = some;
  }
  __builtin_memcpy(values, p, sizeof(values));
#endif
  Eight wide;
#pragma GCC unroll 4
  for (int64_t i = 0; i < Eight::kParts; ++i) {
    wide.part[i] = widen(values[i]);
    if (scale != 1.0) wide.part[i] = widen(narrow(wide.part[i] * scale));
  }
  return wide;
}

inline double squared_norm(const float* row, int64_t dim, double scale) {
  Eight sums = {};
  for (int64_t c = 0; c < dim; c += 8) {
    const Eight values = load_scaled(row + c, dim - c, scale);
    add_products(sums, values, values);
  }
  return sum(sums);
}

// The factors of rows with these squared norms: 1 / max(|row|, 1e-12), or 1 without normalisation;
// 0 for a row that holds a NaN or an infinity (a sum of squares of finite floats does not overflow
// in double).
inline Vector<double> row_scales(const Vector<double>& squared, bool normalize) {
  Vector<double> scales = Vector<double>{} + 1.0;
  if (normalize) {
    const Vector<double> norms = square_roots(squared);
    scales = 1.0 / (norms > 1e-12 ? norms : 1e-12);
  }
  return squared < static_cast<double>(__builtin_inf()) ? scales : 0.0;
}

// The sum of each row, a row to a lane.
inline Eight sum_rows(Eight (&s)[8]) {
#if FLEXVAR_VECTOR_BYTES == 64
  Vector<double> rows[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) rows[i] = s[i].part[0];
  transpose<double>(rows);
  return {
      {((rows[0] + rows[4]) + (rows[2] + rows[6])) + ((rows[1] + rows[5]) + (rows[3] + rows[7]))}};
#else
  double sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = sum(s[i]);
  Eight lanes;
  __builtin_memcpy(&lanes, sums, sizeof(lanes));
  return lanes;
#endif
}

// The factors of eight rows of the codebook, a row to a lane.
inline Eight scales_of_rows(const float* const (&rows)[8], int64_t dim, bool normalize) {
  Eight squares[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    Eight sums = {};
    for (int64_t c = 0; c < dim; c += 8) {
      const Eight row = load_scaled(rows[i] + c, dim - c, 1.0);
      add_products(sums, row, row);
    }
    squares[i] = sums;
  }
  Eight lanes = sum_rows(squares);
#pragma GCC unroll 4
  for (int64_t i = 0; i < Eight::kParts; ++i) lanes.part[i] = row_scales(lanes.part[i], normalize);
  return lanes;
}

// x·e - |e|²/2 of eight codes given by their codebook rows and factors; NaN where a row is not
// finite. x is padded with zeros.
inline void exact_scores(const float* x, const float* const (&rows)[8], const double (&scales)[8],
                         int64_t dim, double (&scores)[8]) {
  Eight dots[8], squares[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    Eight dot = {}, square = {};
    for (int64_t c = 0; c < dim; c += 8) {
      const Eight e = load_scaled(rows[i] + c, dim - c, scales[i]);
      add_products(dot, e, load_scaled(x + c, 8, 1.0));
      add_products(square, e, e);
    }
    dots[i] = dot;
    squares[i] = square;
  }
  const Eight dot = sum_rows(dots), square = sum_rows(squares);
#pragma GCC unroll 4
  for (int64_t i = 0; i < Eight::kParts; ++i) {
    const Vector<double> score = dot.part[i] - 0.5 * square.part[i];
    const Vector<double> scale = load(scales + i * Eight::kLanes);
    store(scores + i * Eight::kLanes,
          scale != 0.0 ? score : static_cast<double>(__builtin_nan("")));
  }
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
    Eight sums = {};
    for (int64_t i = 0; i < rows.count[y]; ++i) {
      const float* line =
          latent + ((rows.start[y] + i) * columns.in_size + columns.start[x]) * dim + c;
      const float row_weight = rows.weights[y * rows.stride + i];
      for (int64_t j = 0; j < columns.count[x]; ++j) {
        // The weight in fp32, so that the product is exact in double.
        const float weight = row_weight * columns.weights[x * columns.stride + j];
        const Eight values = load_scaled(line + j * dim, dim - c, 1.0);
        for (int64_t part = 0; part < Eight::kParts; ++part) {
          sums.part[part] += static_cast<double>(weight) * values.part[part];
        }
      }
    }
    for (int64_t i = 0; i < 8 && c + i < dim; ++i) {
      out[c + i] = static_cast<float>(sums.part[i / Eight::kLanes][i % Eight::kLanes]);
    }
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
    double scales[8], scores[8];
    if (params.scales != nullptr) {
      __builtin_memcpy(scales, params.scales + first, sizeof(scales));
    } else {
      const Eight made = scales_of_rows(rows, params.dim, params.normalize);
      __builtin_memcpy(scales, &made, sizeof(scales));
    }
    exact_scores(x, rows, scales, params.dim, scores);
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
  const Vector<double> squared = Vector<double>{} + squared_norm(row, dim, 1.0);
  const double scale = row_scales(squared, params.normalize)[0];
  for (int64_t c = 0; c < dim; ++c) {
    out[c] = scale != 0.0 ? static_cast<float>(row[c] * scale) : 0.0f;
  }
  params.query_norms[n] =
      scale != 0.0 ? __builtin_sqrt(squared_norm(out, dim, 1.0)) : __builtin_nan("");
}

}  // namespace
}  // namespace flexvar::FLEXVAR_ISA
