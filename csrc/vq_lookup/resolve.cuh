// The nearest code among the groups that the scores leave. Exact arithmetic: the same bits as on
// the CPU.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqResolveThreads = 128;  // a warp a row
constexpr int kVqResolveRows = kVqResolveThreads / 32;

// |score kernel's score - exact score| <= coefficient * (|x||e| + |e|²/2) + constant, for every
// pair of finite rows whose magnitudes the score kernel can represent.
//   Both: the chunk's number replaces the lowest bits of the fp32 score, and `threshold` rounds.
//   fp32: dim + 2 roundings of a term, u = 2^-24; underflow.
//   fp16: inputs round with u = 2^-11, so a product is off by 2u + u², and where they are
//     subnormal by 2^-25 absolutely; a matrix product of 16 terms adds them to the sum truncated at
//     2^-22 of the largest at worst.
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
  return {1.001 * (2 * u + u * u) + (problem.tensor_dim + 16) * 0x1p-22 + packing,
          1.01 * dim * 0x1p-24};
}

struct VqResolveParams {
  VqProblem problem;
  VqWorkspace workspace;
  VqErrorBound bound;
  int64_t* indices;  // [N]
};

struct VqNearest {
  double score;
  int64_t index;

  __device__ __forceinline__ void take(double other_score, int64_t other_index) {
    if (other_score > score || (other_score == score && other_index < index)) {
      score = other_score;
      index = other_index;
    }
  }
};

// Scores the 16 codes of subgroup `subgroup` of the chunk at `first_code`, two lanes to a code.
__device__ __forceinline__ void vq_score_group(const VqResolveParams& params, const float* latent,
                                               int64_t first_code, int subgroup,
                                               VqNearest& nearest) {
  const int lane = static_cast<int>(threadIdx.x) % 32, i = lane % 16;
  const int64_t v = first_code + i / 2 * 8 + subgroup * 2 + i % 2;
  const float* code = params.workspace.codes + v * params.problem.padded_dim;
  double partial[4] = {};
  for (int c = lane / 16 * 4; c < params.problem.padded_dim; c += 8) {
    const float4 x = *reinterpret_cast<const float4*>(latent + c);
    const float4 e = *reinterpret_cast<const float4*>(code + c);
    partial[0] += static_cast<double>(x.x) * static_cast<double>(e.x);
    partial[1] += static_cast<double>(x.y) * static_cast<double>(e.y);
    partial[2] += static_cast<double>(x.z) * static_cast<double>(e.z);
    partial[3] += static_cast<double>(x.w) * static_cast<double>(e.w);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) partial[j] += __shfl_xor_sync(0xffffffffu, partial[j], 16);
  const double dot = (partial[0] + partial[2]) + (partial[1] + partial[3]);
  nearest.take(dot - params.workspace.half_norms[v], v);
}

// All codes that the subgroup's three largest maxima do not settle.
__device__ __forceinline__ void vq_score_split(const VqResolveParams& params, const float* latent,
                                               int64_t split, int subgroup, VqNearest& nearest) {
  const int64_t codes = params.problem.stages_per_split * kVqStageCodes;
  const int64_t first = split * codes, last = first + codes, all = params.problem.padded_codes();
  for (int64_t code = first; code < last && code < all; code += kVqChunkCodes) {
    vq_score_group(params, latent, code, subgroup, nearest);
  }
}

__global__ void __launch_bounds__(kVqResolveThreads, 4) vq_resolve_kernel(VqResolveParams params) {
  ptx::griddepcontrol_wait();
  const VqProblem& problem = params.problem;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row =
      blockIdx.x * static_cast<int64_t>(kVqResolveRows) + static_cast<int>(threadIdx.x) / 32;
  if (row >= problem.num_latents) return;
  const double norm = params.workspace.latent_norms[row];
  if (isnan(norm)) {
    if (lane == 0) params.indices[row] = 0;
    return;
  }
  const float* latent = params.workspace.latents + row * problem.padded_dim;
  const int64_t entries = problem.splits * kVqSubgroups;
  const auto top_of = [&](int64_t entry) -> const VqTop& {
    return params.workspace.tops[(entry / kVqSubgroups * problem.num_latents + row) * kVqSubgroups +
                                 entry % kVqSubgroups];
  };

  const double largest_norm = problem.normalize ? 1.0 + 0x1p-20 : *params.workspace.max_code_norm;
  const double magnitude = largest_norm * (norm + 0.5 * largest_norm);
  const double bound = params.bound.coefficient * magnitude + params.bound.constant;
  // Beyond, fp32 scores may have overflowed, and nothing can be ruled out.
  const bool settles = magnitude < kVqLargestMagnitude && bound < kVqLargestMagnitude;
  float maximum = kVqNoGroup;
  for (int64_t entry = lane; entry < entries; entry += 32) {
    maximum = fmaxf(maximum, top_of(entry).values[0]);
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, other));
  }
  const float threshold = settles ? static_cast<float>(maximum - 2 * bound) : kVqNoGroup;

  VqNearest nearest{-static_cast<double>(INFINITY), 0};
  for (int64_t base = 0; base < entries; base += 32) {
    const int64_t own = base + lane;
    const VqTop top = own < entries ? top_of(own) : VqTop{{kVqNoGroup, kVqNoGroup, kVqNoGroup}};
    const bool unsettled = own < entries && (!settles || top.values[2] >= threshold);
    unsigned whole = __ballot_sync(0xffffffffu, unsettled);
    for (; whole != 0; whole &= whole - 1) {
      const int64_t entry = base + __ffs(static_cast<int>(whole)) - 1;
      vq_score_split(params, latent, entry / kVqSubgroups, static_cast<int>(entry % kVqSubgroups),
                     nearest);
    }
#pragma unroll 1
    for (int place = 0; place < 2; ++place) {
      const float value = place == 0 ? top.values[0] : top.values[1];
      const bool candidate = own < entries && !unsettled && value >= threshold;
      unsigned candidates = __ballot_sync(0xffffffffu, candidate);
      for (; candidates != 0; candidates &= candidates - 1) {
        const int source = __ffs(static_cast<int>(candidates)) - 1;
        const uint32_t bits = __shfl_sync(0xffffffffu, __float_as_uint(value), source);
        const int64_t entry = base + source, chunk = bits & ((1u << kVqChunkBits) - 1);
        const int64_t first_code =
            entry / kVqSubgroups * problem.stages_per_split * kVqStageCodes + chunk * kVqChunkCodes;
        vq_score_group(params, latent, first_code, static_cast<int>(entry % kVqSubgroups), nearest);
      }
    }
  }
#pragma unroll
  for (int other = 8; other > 0; other /= 2) {
    const double score = __shfl_xor_sync(0xffffffffu, nearest.score, other);
    const long long index =
        __shfl_xor_sync(0xffffffffu, static_cast<long long>(nearest.index), other);
    nearest.take(score, index);
  }
  if (lane == 0) params.indices[row] = nearest.index;
}

inline dim3 vq_resolve_grid(const VqProblem& problem) {
  return dim3(static_cast<unsigned>((problem.num_latents + kVqResolveRows - 1) / kVqResolveRows));
}

}  // namespace flexvar
