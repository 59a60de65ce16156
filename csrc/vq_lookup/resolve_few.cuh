// The nearest codes of few latents, from the maxima of vq_score_few_kernel.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/direct_row.cuh"
#include "vq_lookup/error_bound.cuh"
#include "vq_lookup/score_few.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqResolveFewThreads = 64;  // small blocks, spread over all multiprocessors

struct VqResolveFewParams {
  VqScoreFewParams scores;
  float reach;         // a group this far below the row's maximum may hold the nearest code
  float cosine_reach;  // so may a code this far below the largest cosine in fp32
  int64_t* indices;    // [N]
};

// The maxima of a row's groups, 256 chunks at a time.
struct VqGroupMaxima {
  static constexpr int kHeld = 8;  // chunks of a lane
  static constexpr int kBatch = kHeld * 32;
  float4 held[kHeld];

  // From the batch's first on.
  __device__ __forceinline__ void load(const float4* chunks, int count) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float none = kVqNoGroup;
      held[i] = i * 32 + lane < count ? chunks[i * 32 + lane] : float4{none, none, none, none};
    }
  }
  __device__ __forceinline__ float largest() const {
    float largest = kVqNoGroup;
#pragma unroll
    for (const float4& four : held) {
      largest = fmaxf(largest, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
    }
    return largest;
  }
  // Bit 4 i + t: subgroup t of the lane's chunk i.
  __device__ __forceinline__ unsigned reaching(float threshold) const {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float values[] = {held[i].x, held[i].y, held[i].z, held[i].w};
#pragma unroll
      for (int t = 0; t < kVqSubgroups; ++t) {
        if (values[t] >= threshold) bits |= 1u << (i * kVqSubgroups + t);
      }
    }
    return bits;
  }
};

// A warp has a row. The groups within reach are gone through up to three times: for the largest
// cosine in fp32; for the codes that may have it; and where these are several, for the exact scores
// of those.
template <int kSteps>
__global__ void __launch_bounds__(kVqResolveFewThreads, 1)
    vq_resolve_few_kernel(VqResolveFewParams params) {
  const VqDirectRows latents = params.scores.latents, codes = params.scores.codes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(blockIdx.x * (kVqResolveFewThreads / 32) + threadIdx.x / 32);
  if (row >= latents.count) return;
  ptx::griddepcontrol_wait();
  const int chunks = static_cast<int>(params.scores.problem.stages) * kVqChunksPerStage;
  const auto* row_maxima =
      reinterpret_cast<const float4*>(params.scores.group_maxima) + row * chunks;
  VqGroupMaxima maxima;
  maxima.load(row_maxima, chunks);
  const VqQuarterRow<kSteps> latent(latents, row);
  float largest = maxima.largest();
  for (int batch = VqGroupMaxima::kBatch; batch < chunks; batch += VqGroupMaxima::kBatch) {
    maxima.load(row_maxima + batch, chunks - batch);
    largest = fmaxf(largest, maxima.largest());
  }
  const float squares = latent.template dot<float>(latent);
  // Rows in which fp32 may lose digits have no cosine, and neither have such codes.
  const float scale = vq_is_regular(squares) ? rsqrtf(squares) : NAN;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
  }
  const float threshold = largest - params.reach;

  // Codes i and 8 + i of a group are those of lanes 4 i … 4 i + 3.
  float best = -INFINITY;
  int near = 0, index = 0;
  double nearest = -static_cast<double>(INFINITY);
  const bool finite = vq_is_regular(squares) || vq_is_finite(latent.template dot<double>(latent));
#pragma unroll 1
  for (int pass = finite ? 0 : 3; pass < 2 || (pass == 2 && near > 1); ++pass) {
    if (pass == 2) index = 0;
#pragma unroll 1
    for (int batch = 0; batch < chunks; batch += VqGroupMaxima::kBatch) {
      if (chunks > VqGroupMaxima::kBatch) maxima.load(row_maxima + batch, chunks - batch);
      unsigned groups = maxima.reaching(threshold);
      while (unsigned lanes = __ballot_sync(0xffffffffu, groups != 0)) {
        const int source = __ffs(static_cast<int>(lanes)) - 1;
        const int bit = __shfl_sync(0xffffffffu, __ffs(static_cast<int>(groups)) - 1, source);
        if (lane == source) groups &= groups - 1;
        const int chunk = batch + bit / kVqSubgroups * 32 + source;
        const int first = chunk * kVqChunkCodes + bit % kVqSubgroups * 2;
        const int own[2] = {first + vq_code_of_group(lane / 4),
                            first + vq_code_of_group(lane / 4 + 8)};
        const VqQuarterRow<kSteps> rows[2] = {{codes, own[0]}, {codes, own[1]}};
        unsigned candidates[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float code_squares = rows[i].template dot<float>(rows[i]);
          const float dot = rows[i].template dot<float>(latent);
          const float cosine =
              vq_is_regular(code_squares) ? dot * rsqrtf(code_squares) * scale : NAN;
          const bool exists = own[i] < codes.count;
          if (pass == 0 && exists) best = fmaxf(best, cosine);
          const bool candidate = exists && lane % 4 == 0 && !(cosine < best - params.cosine_reach);
          candidates[i] = __ballot_sync(0xffffffffu, candidate);
        }
        if (pass == 1) {
          near += __popc(candidates[0]) + __popc(candidates[1]);
          if ((candidates[0] | candidates[1]) != 0) {
            const bool second = candidates[0] == 0;
            const unsigned which = second ? candidates[1] : candidates[0];
            index = first +
                    vq_code_of_group((__ffs(static_cast<int>(which)) - 1) / 4 + (second ? 8 : 0));
          }
        } else if (pass == 2) {
          const VqExactRow<kSteps> exact(latents, row);
#pragma unroll 1
          for (int four = 0; four < 4; ++four) {
            const unsigned which = candidates[four / 2] >> (four % 2 * 16);
            if ((which & 0xffffu) == 0) continue;
            const int i = four * 4 + lane / kVqLanesPerRow;
            const int code = first + vq_code_of_group(i);
            const double score = exact.score(VqExactRow<kSteps>(codes, code));
            if (score > nearest || (score == nearest && code < index)) {
              nearest = score;
              index = code;
            }
          }
        }
      }
    }
    if (pass == 0) {
#pragma unroll
      for (int other = 16; other > 3; other /= 2) {
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, other));
      }
    }
  }
  if (near > 1) {
#pragma unroll
    for (int other = 16; other >= kVqLanesPerRow; other /= 2) {
      const double score = __shfl_xor_sync(0xffffffffu, nearest, other);
      const int code = __shfl_xor_sync(0xffffffffu, index, other);
      if (score > nearest || (score == nearest && code < index)) {
        nearest = score;
        index = code;
      }
    }
  }
  if (lane == 0) params.indices[row] = index;
}

}  // namespace flexvar
