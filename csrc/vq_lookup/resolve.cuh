// The nearest code among the groups that the scores leave. Exact arithmetic: the same bits as on
// the CPU.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/error_bound.cuh"
#include "vq_lookup/exact_row.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqResolveThreads = 128;
constexpr int kVqResolveRows = kVqResolveThreads / 16;

struct VqResolveParams {
  VqProblem problem;
  VqWorkspace workspace;
  VqErrorBound bound;
  float unit_reach;  // a code's score this far below the largest may be the nearest, if normalised
  int64_t* indices;  // [N]
};

__device__ __forceinline__ void vq_load(float (&x)[4], const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  x[0] = four.x;
  x[1] = four.y;
  x[2] = four.z;
  x[3] = four.w;
}

// A row as four lanes share it for matrix products: word 2k of lane t stands in for components 2t
// and 2t + 1 of step k, word 2k + 1 for 2t + 8 and 2t + 9. Which components these are does not
// matter, as long as rows and codes have the same: neighbours, of which one load gets many.
template <int kSteps>
struct VqSharedRow {
  uint32_t words[2 * kSteps];

  __device__ __forceinline__ explicit VqSharedRow(const __half* row) {
    const int t = static_cast<int>(threadIdx.x % 4);
    if constexpr (kSteps % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kSteps; i += 2) {
        const uint4 four = *reinterpret_cast<const uint4*>(row + i * 16 + t * 8);
        words[2 * i] = four.x;
        words[2 * i + 1] = four.y;
        words[2 * i + 2] = four.z;
        words[2 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const uint2 two = *reinterpret_cast<const uint2*>(row + i * 16 + t * 4);
        words[2 * i] = two.x;
        words[2 * i + 1] = two.y;
      }
    }
  }
};

// Which code of its group a lane scores. Four lanes share the reading of four codes.
__device__ __forceinline__ int vq_code_of_lane(int lane) { return lane / 4 % 4 + lane % 4 * 4; }

// Dot products of a warp's two rows with the 16 codes of a group each, which need not be the same
// group: the lanes of either half have the first code of their row's. Lane i gets that of code
// vq_code_of_lane(i) of its half's group.
template <int kSteps>
class VqDotProducts {
 public:
  // `rows` are the warp's.
  __device__ __forceinline__ VqDotProducts(const VqProblem&, const VqWorkspace& workspace,
                                           const int64_t (&rows)[2])
      : codes_(workspace.codes_half),
        row_(workspace.latents_half + (lane() / 4 % 2 == 0 ? rows[0] : rows[1]) * kLength) {}

  // The matrix product's first operand holds codes: four of the first half's group, four of the
  // other's, four of the first's, four of the other's; the second one the rows in turn. So every
  // lane gets dot products of its half's codes with both rows, half of them of no use.
  __device__ __forceinline__ float operator()(int first_code) const {
    const __half* code =
        codes_ + (static_cast<int64_t>(first_code) + vq_code_of_group(lane() / 4 % 4)) * kLength;
    float dots[4];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const VqSharedRow<kSteps> low(code + vq_code_of_group(i * 4) * kLength);
      const VqSharedRow<kSteps> high(code + vq_code_of_group(i * 4 + 4) * kLength);
      float sums[4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint32_t a[4] = {low.words[2 * k], high.words[2 * k], low.words[2 * k + 1],
                               high.words[2 * k + 1]};
        const uint32_t b[2] = {row_.words[2 * k], row_.words[2 * k + 1]};
        ptx::mma_m16n8k16<__half>(sums, a, b);
      }
      dots[i] = lane() < 16 ? sums[0] : sums[1];
      dots[i + 1] = lane() < 16 ? sums[2] : sums[3];
    }
    const float even = lane() % 4 < 2 ? dots[0] : dots[2];
    const float odd = lane() % 4 < 2 ? dots[1] : dots[3];
    return lane() % 2 == 0 ? even : odd;
  }

 private:
  static constexpr int kLength = kSteps * 16;
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  const __half* codes_;
  VqSharedRow<kSteps> row_;
};

template <>
class VqDotProducts<0> {
 public:
  __device__ __forceinline__ VqDotProducts(const VqProblem& problem, const VqWorkspace& workspace,
                                           const int64_t (&rows)[2])
      : codes_(workspace.codes),
        row_(workspace.latents + (lane() < 16 ? rows[0] : rows[1]) * problem.padded_dim),
        length_(problem.padded_dim) {}

  __device__ __forceinline__ float operator()(int first_code) const {
    const float* code = codes_ + (first_code + vq_code_of_group(lane() / 4 % 4)) * length_;
    float sums[4] = {};
#pragma unroll 1
    for (int c = lane() % 4 * 4; c < length_; c += 16) {
      float x[4];
      vq_load(x, row_ + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float e[4];
        vq_load(e, code + vq_code_of_group(j * 4) * length_ + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j] = fmaf(x[i], e[i], sums[j]);
      }
    }
    const auto exchange = [](bool second, float a, float b, int other) {
      return (second ? b : a) + __shfl_xor_sync(0xffffffffu, second ? a : b, other);
    };
    const float even = exchange(lane() % 4 >= 2, sums[0], sums[2], 2);
    const float odd = exchange(lane() % 4 >= 2, sums[1], sums[3], 2);
    return exchange(lane() % 2 == 1, even, odd, 1);
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  const float* codes_;
  const float* row_;
  int64_t length_;
};

// In double precision, in the order of the CPU's sum. Eight lanes share the row and the code.
__device__ __forceinline__ double vq_exact_score(const VqResolveParams& params, int64_t row,
                                                 int code) {
  const int dim = params.problem.padded_dim, first = static_cast<int>(threadIdx.x % kVqLanesPerRow);
  const float* latent = params.workspace.latents + row * dim;
  const float* other = params.workspace.codes + static_cast<int64_t>(code) * dim;
  double dot = 0;
#pragma unroll 4
  for (int c = first; c < dim; c += kVqLanesPerRow) {
    dot += static_cast<double>(latent[c]) * static_cast<double>(other[c]);
  }
  return vq_sum_of_row(dot) - params.workspace.half_norms[code];
}

struct VqNearest {
  double score;
  int index;

  __device__ __forceinline__ void take(double other_score, int other_index) {
    if (other_score > score || (other_score == score && other_index < index)) {
      score = other_score;
      index = other_index;
    }
  }
  // Of two times eight lanes, each of which has the same.
  __device__ __forceinline__ void take_neighbours() {
    const double other_score = __shfl_xor_sync(0xffffffffu, score, kVqLanesPerRow);
    take(other_score, __shfl_xor_sync(0xffffffffu, index, kVqLanesPerRow));
  }
};

// The chunk of a group, from its marked maximum.
__device__ __forceinline__ int vq_marked_chunk(unsigned part, float marked) {
  return static_cast<int>((part >> 8) * kVqChunksPerStage +
                          (__float_as_uint(marked) & ((1u << kVqChunkBits) - 1)));
}

struct VqResolveStorage {
  float thresholds[kVqResolveRows];
  bool crowded[kVqResolveRows];
  VqNearest nearest[kVqResolveRows];
};

// The nearest code of a crowded row, sought by a whole block, every half of whose warps has a part
// of the groups and gets the nearest of that. They may be many, and one half would need their
// latency one after the other: the whole launch would wait for a few rows.
template <int kSteps>
__device__ __forceinline__ VqNearest vq_resolve_crowded(const VqResolveParams& params, int64_t row,
                                                        float threshold) {
  const VqWorkspace& workspace = params.workspace;
  const int lane = static_cast<int>(threadIdx.x % 32), half_lane = lane & 15;
  const int share = static_cast<int>(threadIdx.x / 16);
  const int entries = static_cast<int>(params.problem.parts) * kVqSubgroups;
  const VqTop* tops = workspace.tops + row * entries;
  const int64_t rows[2] = {row, row};
  const VqDotProducts<kSteps> dot_products(params.problem, workspace, rows);
  VqNearest nearest{-static_cast<double>(INFINITY), 0};
#pragma unroll 1
  for (int base = 0; base < entries; base += 32) {
    const VqTop top = base + lane < entries ? tops[base + lane] : vq_no_top();
    unsigned reaching = __ballot_sync(0xffffffffu, !(top.values[0] < threshold));
#pragma unroll 1
    for (; reaching != 0; reaching &= reaching - 1) {
      const int source = __ffs(static_cast<int>(reaching)) - 1;
      const float first = __shfl_sync(0xffffffffu, top.values[0], source);
      const float second = __shfl_sync(0xffffffffu, top.values[1], source);
      const float third = __shfl_sync(0xffffffffu, top.values[2], source);
      const unsigned part = __shfl_sync(0xffffffffu, top.part, source);
      // Where all three maxima reach the threshold, any group of the subgroup may.
      const bool whole = !(third < threshold);
      const int groups = whole                   ? static_cast<int>(part & 0xff) * kVqChunksPerStage
                         : !(second < threshold) ? 2
                                                 : 1;
#pragma unroll 1
      for (int done = 0; done < groups; done += kVqResolveRows) {
        const int group = done + share;
        const bool active = group < groups;
        const int chunk = whole ? static_cast<int>(part >> 8) * kVqChunksPerStage + group
                                : vq_marked_chunk(part, group == 0 ? first : second);
        const int first_code = active ? chunk * kVqChunkCodes + source % kVqSubgroups * 2 : 0;
        const int code = first_code + vq_code_of_group(vq_code_of_lane(lane));
        const float score = dot_products(first_code) + *workspace.start_of(code);
        unsigned candidates =
            __ballot_sync(0xffffffffu, active && !(score < threshold)) >> (lane & 16) & 0xffffu;
        while (__any_sync(0xffffffffu, candidates != 0)) {
          // Two of each half's.
          const unsigned rest = candidates & (candidates - 1);
          const unsigned own = half_lane >= kVqLanesPerRow && rest != 0 ? rest : candidates;
          const int other =
              __shfl_sync(0xffffffffu, code, (__ffs(static_cast<int>(own)) - 1) & 15, 16);
          const double exact = vq_exact_score(params, row, other);
          if (candidates != 0) nearest.take(exact, other);
          candidates = rest & (rest - 1);
        }
      }
    }
  }
  nearest.take_neighbours();
  return nearest;
}

// Half a warp has a row. kSteps: those of vq_score_tensor_kernel, or 0 behind
// vq_score_float_kernel.
template <int kSteps>
__global__ void __launch_bounds__(kVqResolveThreads, kSteps == 1 || kSteps == 2 ? 8 : 5)
    vq_resolve_kernel(VqResolveParams params) {
  auto& shared = shared_storage<VqResolveStorage>();
  const VqProblem& problem = params.problem;
  const VqWorkspace& workspace = params.workspace;
  const int lane = static_cast<int>(threadIdx.x % 32), half = lane & 16, half_lane = lane & 15;
  const int own = static_cast<int>(threadIdx.x / 16);
  const int64_t block_row = blockIdx.x * static_cast<int64_t>(kVqResolveRows);
  // Behind the last row it takes part once more.
  const int64_t left = problem.num_latents - block_row;
  const int last = static_cast<int>(left < kVqResolveRows ? left : kVqResolveRows) - 1;
  const auto row_of = [&](int i) { return block_row + (i < last ? i : last); };
  const int64_t rows[2] = {row_of(own & ~1), row_of(own | 1)};
  const int64_t row = half == 0 ? rows[0] : rows[1];
  const int entries = static_cast<int>(problem.parts) * kVqSubgroups;
  const VqTop* tops = workspace.tops + row * entries;
  const auto load_top = [&](int entry) { return entry < entries ? tops[entry] : vq_no_top(); };

  ptx::griddepcontrol_wait();
  const double norm = workspace.latent_norms[row];  // NaN: no code is near
  VqTop top = load_top(half_lane);
  const VqDotProducts<kSteps> dot_products(problem, workspace, rows);
  float maximum = top.values[0];
#pragma unroll 4
  for (int entry = half_lane + 16; entry < entries; entry += 16) {
    maximum = fmaxf(maximum, tops[entry].values[0]);
  }
#pragma unroll
  for (int other = 8; other > 0; other /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, other));
  }
  float threshold = maximum - params.unit_reach;
  if (!problem.normalize) {
    const double largest_norm = *workspace.max_code_norm;
    const double magnitude = largest_norm * (norm + 0.5 * largest_norm);
    const double bound = params.bound.coefficient * magnitude + params.bound.constant;
    // Beyond, fp32 scores may have overflowed, and nothing can be ruled out.
    const bool settles = magnitude < kVqLargestMagnitude && bound < kVqLargestMagnitude;
    threshold = settles ? static_cast<float>(maximum - 2 * bound) : -INFINITY;
  }
  if (isnan(norm)) threshold = INFINITY;
  const auto half_ballot = [&](bool predicate) {
    return __ballot_sync(0xffffffffu, predicate) >> half & 0xffffu;
  };

  // Candidates are codes whose score reaches the threshold. A lane holds the two latest that it
  // found; rows that may have more are crowded.
  int codes[2] = {-1, -1};
  bool crowded = false;
#pragma unroll 1
  for (int base = 0; base < entries; base += 16) {
    if (base > 0) top = load_top(base + half_lane);
    const bool whole = !(top.values[2] < threshold);
    crowded |= whole;
    const int subgroup = lane % kVqSubgroups * 2;
    const int first_codes[2] = {
        vq_marked_chunk(top.part, top.values[0]) * kVqChunkCodes + subgroup,
        vq_marked_chunk(top.part, top.values[1]) * kVqChunkCodes + subgroup};
    unsigned groups = half_ballot(!whole && !(top.values[0] < threshold)) |
                      half_ballot(!whole && !(top.values[1] < threshold)) << 16;
    while (__any_sync(0xffffffffu, groups != 0)) {
      const bool active = groups != 0;
      const int bit = (__ffs(static_cast<int>(groups)) - 1) & 31;
      groups &= groups - 1;
      const int first = __shfl_sync(0xffffffffu, first_codes[0], bit, 16);
      const int second = __shfl_sync(0xffffffffu, first_codes[1], bit, 16);
      const int first_code = !active ? 0 : bit < 16 ? first : second;
      const int code = first_code + vq_code_of_group(vq_code_of_lane(lane));
      const float start = *workspace.start_of(code);
      const float score = dot_products(first_code) + start;
      if (active && !(score < threshold)) {
        crowded |= codes[1] >= 0;
        codes[1] = codes[0];
        codes[0] = code;
      }
    }
  }
  crowded = half_ballot(crowded) != 0;

  unsigned candidates = half_ballot(codes[0] >= 0) | half_ballot(codes[1] >= 0) << 16;
  const auto candidate = [&](unsigned of) {
    const int bit = (__ffs(static_cast<int>(of)) - 1) & 31;
    const int first = __shfl_sync(0xffffffffu, codes[0], bit, 16);
    const int second = __shfl_sync(0xffffffffu, codes[1], bit, 16);
    return bit < 16 ? first : second;
  };
  VqNearest nearest{-static_cast<double>(INFINITY), 0};
  const bool clear = (candidates & (candidates - 1)) == 0;
  const int only = candidate(candidates);
  if (clear) {
    if (candidates != 0) nearest.index = only;
    candidates = 0;
  }
  if (crowded) candidates = 0;
  if (__any_sync(0xffffffffu, candidates != 0)) {
    do {
      // Two of each half's.
      const unsigned rest = candidates & (candidates - 1);
      const int other = candidate(half_lane >= kVqLanesPerRow && rest != 0 ? rest : candidates);
      const int compared = candidates != 0 ? other : 0;
      const double exact = vq_exact_score(params, row, compared);
      if (candidates != 0) nearest.take(exact, compared);
      candidates = rest & (rest - 1);
    } while (__any_sync(0xffffffffu, candidates != 0));
    nearest.take_neighbours();
  }
  const bool real = own <= last;
  if (half_lane == 0) {
    if (real && !crowded) params.indices[row] = nearest.index;
    shared.thresholds[own] = threshold;
    shared.crowded[own] = real && crowded;
  }
  if (!__syncthreads_or(real && crowded)) return;

#pragma unroll 1
  for (int i = 0; i < kVqResolveRows; ++i) {
    if (!shared.crowded[i]) continue;
    const VqNearest of_half =
        vq_resolve_crowded<kSteps>(params, block_row + i, shared.thresholds[i]);
    if (half_lane == 0) shared.nearest[own] = of_half;
    __syncthreads();
    if (threadIdx.x == 0) {
      VqNearest of_block = of_half;
      for (int j = 1; j < kVqResolveRows; ++j) {
        of_block.take(shared.nearest[j].score, shared.nearest[j].index);
      }
      params.indices[block_row + i] = of_block.index;
    }
    __syncthreads();  // before the next row's
  }
}

inline int64_t vq_resolve_blocks(const VqProblem& problem) {
  return divide_up(problem.num_latents, kVqResolveRows);
}

}  // namespace flexvar
