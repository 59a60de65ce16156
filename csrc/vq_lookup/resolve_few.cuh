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

// The largest of a row's groups in chunks lane, lane + 32, …
__device__ __forceinline__ float vq_lane_maximum(const float4* chunk_maxima, int chunks) {
  constexpr int kAtATime = 8;
  float largest = kVqNoGroup;
#pragma unroll 1
  for (int base = static_cast<int>(threadIdx.x % 32); base < chunks; base += kAtATime * 32) {
    float4 four[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const float none = kVqNoGroup;
      four[i] =
          base + i * 32 < chunks ? chunk_maxima[base + i * 32] : float4{none, none, none, none};
    }
#pragma unroll
    for (const float4& own : four) {
      largest = fmaxf(largest, fmaxf(fmaxf(own.x, own.y), fmaxf(own.z, own.w)));
    }
  }
  return largest;
}

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
  const VqQuarterRow<kSteps> latent(latents, row);  // an argument, which no kernel before writes
  const float squares = latent.template dot<float>(latent);
  // Rows in which fp32 may lose digits have no cosine, and neither have such codes.
  const float scale = vq_is_regular(squares) ? rsqrtf(squares) : NAN;
  const bool finite = vq_is_regular(squares) || vq_is_finite(latent.template dot<double>(latent));
  const int chunks = static_cast<int>(params.scores.problem.stages) * kVqChunksPerStage;
  const float* row_maxima = params.scores.group_maxima + int64_t{row} * chunks * kVqSubgroups;

  ptx::griddepcontrol_wait();
  const float own_largest = vq_lane_maximum(reinterpret_cast<const float4*>(row_maxima), chunks);
  float largest = own_largest;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
  }
  const float threshold = largest - params.reach;
  const unsigned reaching = __ballot_sync(0xffffffffu, own_largest >= threshold);

  // Codes i and 8 + i of a group are those of lanes 4 i … 4 i + 3.
  const auto code_of = [&](int first, int i) { return first + vq_code_of_group(lane / 4 + i * 8); };
  float best = -INFINITY;
  int seen = 0, near = 0, first = 0, index = 0;
  float cosines[2];
  unsigned candidates[2];
  const auto find_candidates = [&] {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = code_of(first, i) < codes.count;
      const bool candidate = exists && lane % 4 == 0 && !(cosines[i] < best - params.cosine_reach);
      candidates[i] = __ballot_sync(0xffffffffu, candidate);
    }
  };
  const auto count_candidates = [&] {
    near += __popc(candidates[0]) + __popc(candidates[1]);
    if ((candidates[0] | candidates[1]) != 0) {
      const bool second = candidates[0] == 0;
      const unsigned which = second ? candidates[1] : candidates[0];
      index = first + vq_code_of_group((__ffs(static_cast<int>(which)) - 1) / 4 + (second ? 8 : 0));
    }
  };
  double nearest = -static_cast<double>(INFINITY);
#pragma unroll 1
  for (int pass = finite ? 0 : 3; pass < 2 || (pass == 2 && near > 1); ++pass) {
    if (pass == 2) index = 0;
#pragma unroll 1
    for (unsigned sources = reaching; sources != 0; sources &= sources - 1) {
      const int source = __ffs(static_cast<int>(sources)) - 1;
#pragma unroll 1
      for (int base = source; base < chunks; base += 8 * 32) {
        // Eight chunks of that lane's, whose groups the lanes compare side by side.
        const int own_chunk = base + lane / kVqSubgroups * 32;
        const float maximum = own_chunk < chunks
                                  ? row_maxima[own_chunk * kVqSubgroups + lane % kVqSubgroups]
                                  : kVqNoGroup;
#pragma unroll 1
        for (unsigned groups = __ballot_sync(0xffffffffu, maximum >= threshold); groups != 0;
             groups &= groups - 1) {
          const int group = __ffs(static_cast<int>(groups)) - 1;
          first = (base + group / kVqSubgroups * 32) * kVqChunkCodes + group % kVqSubgroups * 2;
          const VqQuarterRow<kSteps> rows[2] = {{codes, code_of(first, 0)},
                                                {codes, code_of(first, 1)}};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float code_squares = rows[i].template dot<float>(rows[i]);
            const float dot = rows[i].template dot<float>(latent);
            cosines[i] = vq_is_regular(code_squares) ? dot * rsqrtf(code_squares) * scale : NAN;
            if (pass == 0 && code_of(first, i) < codes.count) best = fmaxf(best, cosines[i]);
          }
          if (pass == 0) {
            ++seen;
            continue;
          }
          find_candidates();
          if (pass == 1) {
            count_candidates();
            continue;
          }
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
      if (seen == 1) {  // the only group's cosines are still there
        find_candidates();
        count_candidates();
        pass = 1;
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
