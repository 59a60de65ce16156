// How far scores and cosines may be from the exact ones.
#pragma once

#include "vq_lookup/workspace.cuh"

namespace flexvar {

// |score - exact score| <= coefficient * (|x||e| + |e|²/2) + constant, for every pair of finite
// rows whose magnitudes the score kernel can represent. The score is the score kernel's, or one of
// the same inputs with fp32 sums in any order.
//   All: the chunk's number replaces the lowest bits of the fp32 score, and `threshold` rounds.
//   fp32: dim + 2 roundings of a term, u = 2^-24; underflow.
//   fp16: inputs round with u = 2^-11, so a product is off by 2u + u², and where they are
//     subnormal by 2^-25 absolutely; a matrix product of 16 terms adds them to the sum truncated at
//     2^-22 of the largest at worst. Scores of codes of length 1 within 2^-22 may begin, or end,
//     with -1/2, not -|e|²/2.
//   Few: inputs are normalised in fp32 with 2^-24 times dim / 8 + 8 at most (half of the sum of
//     squares' dim / 4 + 2, rsqrtf's 4, two products).
struct VqErrorBound {
  double coefficient;
  double constant;
};

inline VqErrorBound vq_error_bound(const VqProblem& problem) {
  const double packing = 1.01 / (1 << (23 - kVqChunkBits)) + 0x1p-22;
  const double dim = problem.dim;
  if (problem.tensor_dim == 0) {
    const double roundings = (dim + 8) * 0x1p-24;
    return {roundings < 0.5 ? roundings / (1 - roundings) + packing : 1e30, (dim + 8) * 0x1p-126};
  }
  const double u = 0x1p-11;
  const double sum = (problem.tensor_dim + 16) * 0x1p-22 + packing;
  const double normalizing = problem.few ? 1.01 * (dim / 4 + 16) * 0x1p-24 : 0.0;
  return {1.001 * (2 * u + u * u) + sum + normalizing, 1.01 * dim * 0x1p-24 + 0x1p-22};
}

// Twice the bound for rows that have been normalised.
inline float vq_unit_reach(const VqErrorBound& bound) {
  return static_cast<float>(2.001 * (1.5001 * bound.coefficient + bound.constant));
}

// |cosine - (exact score + 1/2)| of few latents, with u = 2^-24: dim / 4 + 2 for either of
// the dot product and the sums of squares, rsqrtf's 4 twice, two products; and 3 for the exact
// score, whose rows are rounded.
inline double vq_cosine_bound(const VqProblem& problem) {
  return (problem.dim / 2.0 + 32) * 0x1p-24;
}

}  // namespace flexvar
