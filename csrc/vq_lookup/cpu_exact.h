// The arithmetic that decides which code is nearest, and what rows it decides between: the same
// bits with every instruction set and on every device. A product of two floats is exact in double,
// so contraction to fma changes nothing; the sums go to eight partial sums by component, which are
// added as ((0+4)+(2+6)) + ((1+5)+(3+7)).
#pragma once

#include "vq_lookup/cpu_kernel.h"

// Vectors wider than the instruction set's registers are passed between inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

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
  Double8 values = {};
  if (count >= 8) {
    values = __builtin_convertvector(*reinterpret_cast<const UnalignedFloat8*>(p), Double8);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  }
  if (scale == 1.0) return values;
  typedef float Float8 __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(values * scale, Float8), Double8);
}

inline double squared_norm(const float* row, int64_t dim, double scale) {
  Double8 sums = {};
  for (int64_t c = 0; c < dim; c += 8) {
    const Double8 values = load_scaled(row + c, dim - c, scale);
    sums += values * values;
  }
  return sum(sums);
}

// The factor of a row: 1 / max(|row|, 1e-12), or 1 without normalisation; 0 for a row that holds a
// NaN or an infinity (a sum of squares of finite floats does not overflow in double).
inline double row_scale(const float* row, int64_t dim, bool normalize) {
  const double squared = squared_norm(row, dim, 1.0);
  if (!(squared < static_cast<double>(__builtin_inf()))) return 0.0;
  if (!normalize) return 1.0;
  const double norm = __builtin_sqrt(squared);
  return 1.0 / (norm > 1e-12 ? norm : 1e-12);
}

// x·e - |e|²/2 of a code given by its codebook row and factor; x is padded with zeros.
inline double exact_score(const float* x, const float* row, int64_t dim, double scale) {
  Double8 dots = {}, squares = {};
  for (int64_t c = 0; c < dim; c += 8) {
    const Double8 e = load_scaled(row + c, dim - c, scale);
    dots += e * __builtin_convertvector(*reinterpret_cast<const UnalignedFloat8*>(x + c), Double8);
    squares += e * e;
  }
  return sum(dots) - 0.5 * sum(squares);
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

// The code among `num` from `first` on, every `step`-th, whose exact score with the query x beats
// that of `best`; of equal ones the lowest.
struct Best {
  double score = -static_cast<double>(kInfinity);
  int64_t code = 0;
};
inline void find_best(const VqLookupParams& params, const float* x, int64_t first, int64_t last,
                      int64_t step, Best& best) {
  for (int64_t v = first; v < last && v < params.num_codes; v += step) {
    const double scale = params.inverse_norms[v];
    if (scale == 0.0) continue;
    const double score = exact_score(x, params.codebook + v * params.dim, params.dim, scale);
    if (score > best.score || (score == best.score && v < best.code)) best = {score, v};
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
  const double scale = row_scale(row, dim, params.normalize);
  for (int64_t c = 0; c < dim; ++c) {
    out[c] = scale != 0.0 ? static_cast<float>(row[c] * scale) : 0.0f;
  }
  params.query_norms[n] =
      scale != 0.0 ? __builtin_sqrt(squared_norm(out, dim, 1.0)) : __builtin_nan("");
}

}  // namespace
}  // namespace flexvar::FLEXVAR_ISA
