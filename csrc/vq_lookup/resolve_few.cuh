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

// A lane's groups: those of chunks lane, lane + 32, …, so many chunks at a time.
constexpr int kVqLaneChunks = 8;

class VqLaneMaxima {
 public:
  // From chunk `first` on, a multiple of kVqLaneChunks * 32.
  __device__ __forceinline__ VqLaneMaxima(const float4* chunk_maxima, int first, int chunks) {
    constexpr float kNone = kVqNoGroup;
#pragma unroll
    for (int i = 0; i < kVqLaneChunks; ++i) {
      const int chunk = first + static_cast<int>(threadIdx.x % 32) + i * 32;
      four_[i] = chunk < chunks ? chunk_maxima[chunk] : float4{kNone, kNone, kNone, kNone};
    }
  }
  __device__ __forceinline__ float largest() const {
    float largest = kVqNoGroup;
#pragma unroll
    for (const float4& own : four_) {
      largest = fmaxf(largest, fmaxf(fmaxf(own.x, own.y), fmaxf(own.z, own.w)));
    }
    return largest;
  }
  // A bit for every group: of chunk i subgroup t has bit 4 i + t.
  __device__ __forceinline__ unsigned reaching(float threshold) const {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kVqLaneChunks; ++i) {
      const float own[kVqSubgroups] = {four_[i].x, four_[i].y, four_[i].z, four_[i].w};
#pragma unroll
      for (int t = 0; t < kVqSubgroups; ++t) {
        bits |= own[t] >= threshold ? 1u << (i * kVqSubgroups + t) : 0u;
      }
    }
    return bits;
  }

 private:
  static_assert(kVqLaneChunks * kVqSubgroups == 32);
  float4 four_[kVqLaneChunks];
};

// Groups that are compared side by side: nearly always all that there are.
__host__ __device__ constexpr int vq_groups_at_a_time(int steps) { return steps <= 2 ? 4 : 2; }

// A warp has a row. The groups within reach are gone through up to three times: for the largest
// cosine in fp32; for the codes that may have it; and where these are several, for the exact scores
// of those.
template <int kSteps>
__global__ void __launch_bounds__(kVqResolveFewThreads, 1)
    vq_resolve_few_kernel(VqResolveFewParams params) {
  ptx::griddepcontrol_launch_dependents();
  const VqDirectRows latents = params.scores.latents, codes = params.scores.codes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(blockIdx.x * (kVqResolveFewThreads / 32) + threadIdx.x / 32);
  if (row >= latents.count) return;
  const int chunks = static_cast<int>(params.scores.problem.stages) * kVqChunksPerStage;
  const auto* chunk_maxima =
      reinterpret_cast<const float4*>(params.scores.group_maxima) + int64_t{row} * chunks;
  static_assert(kVqSubgroups == 4);
  constexpr int kAtATime = kVqLaneChunks * 32;  // chunks

  ptx::griddepcontrol_wait();
  const VqQuarterRow<kSteps> latent(latents, row);
  VqLaneMaxima maxima(chunk_maxima, 0, chunks);
  float largest = maxima.largest();
#pragma unroll 1
  for (int first = kAtATime; first < chunks; first += kAtATime) {
    largest = fmaxf(largest, VqLaneMaxima(chunk_maxima, first, chunks).largest());
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
  }
  const float threshold = largest - params.reach;
  const float squares = latent.template dot<float>(latent);
  // Rows in which fp32 may lose digits have no cosine, and neither have such codes.
  const float scale = vq_is_regular(squares) ? rsqrtf(squares) : NAN;
  const bool finite = vq_is_regular(squares) || vq_is_finite(latent.template dot<double>(latent));

  // Codes i and 8 + i of a group are those of lanes 4 i … 4 i + 3.
  constexpr int kGroups = vq_groups_at_a_time(kSteps);
  const auto code_of = [&](int first, int i) { return first + vq_code_of_group(lane / 4 + i * 8); };
  float best = -INFINITY;
  int near = 0, index = 0;
  int groups = 0;  // at hand
  int first_codes[kGroups];
  float cosines[kGroups][2];
  const auto compare = [&] {
    VqQuarterRow<kSteps> rows[kGroups][2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g >= groups) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[g][i] = VqQuarterRow<kSteps>(codes, code_of(first_codes[g], i));
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g >= groups) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float code_squares = rows[g][i].template dot<float>(rows[g][i]);
        const float dot = rows[g][i].template dot<float>(latent);
        cosines[g][i] = vq_is_regular(code_squares) ? dot * rsqrtf(code_squares) * scale : NAN;
      }
    }
  };
  // The lanes whose code i of group g may have the largest cosine.
  const auto candidates_of = [&](int g, int i) {
    const bool exists = code_of(first_codes[g], i) < codes.count;
    const bool candidate = exists && lane % 4 == 0 && !(cosines[g][i] < best - params.cosine_reach);
    return __ballot_sync(0xffffffffu, candidate);
  };
  const auto count_candidates = [&] {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g >= groups) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned which = candidates_of(g, i);
        near += __popc(which);
        if (which != 0) {
          const int lane_of = __ffs(static_cast<int>(which)) - 1;
          index = first_codes[g] + vq_code_of_group(lane_of / 4 + i * 8);
        }
      }
    }
  };
  double nearest = -static_cast<double>(INFINITY);
  const auto take_exact = [&] {
    const VqExactRow<kSteps> exact(latents, row);
#pragma unroll 1
    for (; groups > 0; --groups) {
      const unsigned which[2] = {candidates_of(0, 0), candidates_of(0, 1)};
#pragma unroll 1
      for (int four = 0; four < 4; ++four) {
        if (((four < 2 ? which[0] : which[1]) >> (four % 2 * 16) & 0xffffu) == 0) continue;
        const int code = first_codes[0] + vq_code_of_group(four * 4 + lane / kVqLanesPerRow);
        const double score = exact.score(VqExactRow<kSteps>(codes, code));
        if (score > nearest || (score == nearest && code < index)) {
          nearest = score;
          index = code;
        }
      }
      // The next group becomes the first: no index into registers.
#pragma unroll
      for (int g = 1; g < kGroups; ++g) {
        first_codes[g - 1] = first_codes[g];
        cosines[g - 1][0] = cosines[g][0];
        cosines[g - 1][1] = cosines[g][1];
      }
    }
  };

  const unsigned first_reaching = maxima.reaching(threshold);
  int times = 0;  // that groups are compared
#pragma unroll 1
  for (int pass = finite ? 0 : 3; pass < 2 || (pass == 2 && near > 1); ++pass) {
    if (pass == 2) index = 0;
#pragma unroll 1
    for (int first = 0; first < chunks; first += kAtATime) {
      unsigned reaching = first == 0
                              ? first_reaching
                              : VqLaneMaxima(chunk_maxima, first, chunks).reaching(threshold);
      unsigned sources = __ballot_sync(0xffffffffu, reaching != 0);
#pragma unroll 1
      while (sources != 0) {
        groups = 0;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          if (sources == 0) continue;
          ++groups;
          const int source = __ffs(static_cast<int>(sources)) - 1;
          const unsigned of_source = __shfl_sync(0xffffffffu, reaching, source);
          const int group = __ffs(static_cast<int>(of_source)) - 1;
          const int chunk = first + source + group / kVqSubgroups * 32;
          first_codes[g] = chunk * kVqChunkCodes + group % kVqSubgroups * 2;
          if (lane == source) reaching &= reaching - 1;
          if ((of_source & (of_source - 1)) == 0) sources &= sources - 1;
        }
        compare();
        if (pass == 1) count_candidates();
        if (pass == 2) take_exact();
        if (pass > 0) continue;
        ++times;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          if (g >= groups) continue;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (code_of(first_codes[g], i) < codes.count) best = fmaxf(best, cosines[g][i]);
          }
        }
      }
    }
    if (pass == 0) {
#pragma unroll
      for (int other = 16; other > 3; other /= 2) {
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, other));
      }
      if (times == 1) {  // all cosines are still there
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
