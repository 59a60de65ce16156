#include "vq_lookup/cpu_kernel.h"

#ifdef FLEXVAR_X86
#include <immintrin.h>
#endif

// Vectors wider than the instruction set's registers are passed between inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace flexvar::FLEXVAR_ISA {
namespace {

// kRows x kVectors accumulators, kRows running maxima, and the operands fill the register file.
#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 8, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 4, kVectors = 2;
#endif
static_assert(kVqRowMultiple % kRows == 0 && kLanes <= kVqMaxLanes);

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float UnalignedVec
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef double Double8 __attribute__((vector_size(64)));
typedef float UnalignedFloat8 __attribute__((vector_size(32), aligned(4), may_alias));

constexpr int kVectorsPerBlock = kVqBlockCodes / kLanes;
constexpr float kInfinity = __builtin_inff();

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Bit i: !(v[i] < threshold), so that NaN (from an overflow) counts as a candidate.
inline unsigned not_less(Vec v, float threshold) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(v, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(threshold), _CMP_NLT_UQ));
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<unsigned>(!(v[i] < threshold)) << i;
  return mask;
#endif
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Exact arithmetic: the same bits with every instruction set and on every device. A product of two
// floats is exact in double, so contraction to fma changes nothing; the sums go to eight partial
// sums by component, which are added as ((0+4)+(2+6)) + ((1+5)+(3+7)).

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

// Pass 1: kRows queries against one block. kDim = 0: any dim.
template <int kDim>
void score_tile(const float* queries, int64_t query_stride, const float* block,
                const float* negative_half, int64_t dim, float* group_max, int64_t group_stride) {
  const int64_t components = kDim ? kDim : dim;
  Vec best[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) best[m] = Vec{} - kInfinity;
  for (int first = 0; first < kVectorsPerBlock; first += kVectors) {
    Vec score[kRows][kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) {
      const Vec start = load(negative_half + (first + n) * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) score[m][n] = start;
    }
    const float* codes = block + first * kLanes * components;
#pragma GCC unroll 4
    for (int64_t c = 0; c < components; ++c) {
      Vec e[kVectors];
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) e[n] = load(codes + (n * components + c) * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vec x = queries[m * query_stride + c] - Vec{};
#pragma GCC unroll 8
        for (int n = 0; n < kVectors; ++n) score[m][n] += x * e[n];
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) best[m] = maximum(score[m][n], best[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) store(group_max + m * group_stride, best[m]);
}

}  // namespace

void vq_prepare_codes(const VqLookupParams& params, int64_t block_begin, int64_t block_end) {
  const int64_t dim = params.dim;
  for (int64_t b = block_begin; b < block_end; ++b) {
    double largest = 0;
    for (int64_t i = 0; i < kVqBlockCodes; ++i) {
      const int64_t v = b * kVqBlockCodes + i;
      const float* row = params.codebook + v * dim;
      float* out = params.packed_codes + (v / kLanes) * dim * kLanes + v % kLanes;
      const double scale = v < params.num_codes ? row_scale(row, dim, params.normalize) : 0.0;
      if (v < params.num_codes) params.inverse_norms[v] = scale;
      if (scale == 0.0) {
        params.negative_half[v] = -kInfinity;
        for (int64_t c = 0; c < dim; ++c) out[c * kLanes] = 0;
        continue;
      }
      const double squared = squared_norm(row, dim, scale);
      params.negative_half[v] = static_cast<float>(-0.5 * squared);
      largest = squared > largest ? squared : largest;
      for (int64_t c = 0; c < dim; ++c) out[c * kLanes] = static_cast<float>(row[c] * scale);
    }
    params.block_norms[b] = __builtin_sqrt(largest);
  }
}

void vq_prepare_latents(const VqLookupParams& params, int64_t row_begin, int64_t row_end) {
  const int64_t dim = params.dim, padded = params.padded_dim();
  for (int64_t n = row_begin; n < row_end; ++n) {
    float* out = params.queries + n * padded;
    for (int64_t c = 0; c < padded; ++c) out[c] = 0;
    if (n >= params.num_latents) continue;
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
}

void vq_score(const VqLookupParams& params, int64_t row_begin, int64_t row_end, int64_t block_begin,
              int64_t block_end) {
  const auto tile = params.dim == 32  ? score_tile<32>
                    : params.dim == 8 ? score_tile<8>
                                      : score_tile<0>;
  const int64_t padded = params.padded_dim(), groups = params.blocks() * kVqMaxLanes;
  for (int64_t b = block_begin; b < block_end; ++b) {
    for (int64_t n = row_begin; n < row_end; n += kRows) {
      tile(params.queries + n * padded, padded,
           params.packed_codes + b * kVqBlockCodes * params.dim,
           params.negative_half + b * kVqBlockCodes, params.dim,
           params.group_max + (n - params.first_row) * groups + b * kVqMaxLanes, groups);
    }
  }
}

void vq_resolve(const VqLookupParams& params, int64_t row_begin, int64_t row_end) {
  const int64_t dim = params.dim, blocks = params.blocks();
  // |fp32 score - exact score| <= n u / (1 - n u) * (|x||e| + |e|²/2) with n roundings on the way
  // of a term (dim products and sums, |e|²/2, the threshold below), u = 2^-24; and what underflows
  // or is flushed to zero.
  const double roundings = (static_cast<double>(dim) + 8) * 0x1p-24;
  for (int64_t n = row_begin; n < row_end; ++n) {
    params.indices[n] = 0;
    const double norm = params.query_norms[n];
    if (norm != norm) continue;
    const double magnitude = params.max_code_norm * (norm + 0.5 * params.max_code_norm);
    const double bound =
        magnitude < 1e37 && roundings < 0.5
            ? roundings / (1 - roundings) * magnitude + (static_cast<double>(dim) + 8) * 0x1p-126
            : static_cast<double>(kInfinity);
    const float* group_max = params.group_max + (n - params.first_row) * blocks * kVqMaxLanes;
    Vec best_of_lane = load(group_max);
    for (int64_t b = 1; b < blocks; ++b) {
      best_of_lane = maximum(load(group_max + b * kVqMaxLanes), best_of_lane);
    }
    float largest = best_of_lane[0];
    for (int i = 1; i < kLanes; ++i)
      largest = best_of_lane[i] > largest ? best_of_lane[i] : largest;
    // An infinite bound makes every group a candidate, whatever overflowed.
    const float threshold = bound < 1e37 ? static_cast<float>(largest - 2 * bound) : -kInfinity;

    double best_score = -static_cast<double>(kInfinity);
    int64_t best = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      for (unsigned mask = not_less(load(group_max + b * kVqMaxLanes), threshold); mask != 0;
           mask &= mask - 1) {
        const int64_t first = b * kVqBlockCodes + __builtin_ctz(mask);
        for (int64_t v = first; v < first + kVqBlockCodes && v < params.num_codes; v += kLanes) {
          const double scale = params.inverse_norms[v];
          if (scale == 0.0) continue;
          const double score = exact_score(params.queries + n * params.padded_dim(),
                                           params.codebook + v * dim, dim, scale);
          if (score > best_score || (score == best_score && v < best)) {
            best_score = score;
            best = v;
          }
        }
      }
    }
    params.indices[n] = best;
  }
}

}  // namespace flexvar::FLEXVAR_ISA
