#include "vq_lookup/cpu_kernel.h"

#ifdef FLEXVAR_X86
#include <immintrin.h>
#endif

#include "vq_lookup/cpu_codes.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

// kRows x kVectors accumulators, kRows running maxima, and the operands fill the register file.
#ifdef __AVX512F__
constexpr int kRows = 8, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int kLanes = kFloatLanes;
static_assert(kVqRowMultiple % kRows == 0 && kLanes <= kVqMaxLanes);

using Vec = Vector<float>;

constexpr int kVectorsPerBlock = kVqBlockCodes / kLanes;

// Bit i: !(v[i] < threshold), so that NaN (from an overflow) counts as a candidate.
inline unsigned not_less(Vec v, float threshold) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(threshold), _CMP_NLT_UQ));
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<unsigned>(!(v[i] < threshold)) << i;
  return mask;
#endif
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
      for (int n = 0; n < kVectors; ++n) best[m] = larger(score[m][n], best[m]);
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
    for (int64_t vector = 0; vector < kVectorsPerBlock; ++vector) {
      const int64_t first = b * kVqBlockCodes + vector * kLanes;
      double squares[kLanes];
      make_codes(params, b * kVqBlockCodes + vector, kVectorsPerBlock,
                 params.packed_codes + first * dim, squares);
      for (int i = 0; i < kLanes; ++i) {
        params.negative_half[first + i] =
            squares[i] == squares[i] ? static_cast<float>(-0.5 * squares[i]) : -kInfinity;
        largest = squares[i] > largest ? squares[i] : largest;
      }
    }
    params.block_norms[b] = __builtin_sqrt(largest);
  }
}

void vq_prepare_latents(const VqLookupParams& params, int64_t row_begin, int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; ++n) prepare_latent(params, n);
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
      best_of_lane = larger(load(group_max + b * kVqMaxLanes), best_of_lane);
    }
    float largest = best_of_lane[0];
    for (int i = 1; i < kLanes; ++i)
      largest = best_of_lane[i] > largest ? best_of_lane[i] : largest;
    // An infinite bound makes every group a candidate, whatever overflowed.
    const float threshold = bound < 1e37 ? static_cast<float>(largest - 2 * bound) : -kInfinity;

    Best best;
    for (int64_t b = 0; b < blocks; ++b) {
      for (unsigned mask = not_less(load(group_max + b * kVqMaxLanes), threshold); mask != 0;
           mask &= mask - 1) {
        const int64_t first = b * kVqBlockCodes + __builtin_ctz(mask) * kVectorsPerBlock;
        find_best(params, params.queries + n * params.padded_dim(), first, kVectorsPerBlock, best);
      }
    }
    params.indices[n] = best.code;
  }
}

}  // namespace flexvar::FLEXVAR_ISA
