// The nearest code among the groups that the scores leave. Exact arithmetic: the same bits as on
// the CPU.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/error_bound.cuh"
#include "vq_lookup/exact_row.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqResolveThreads = 128;
constexpr int kVqResolveRows = kVqResolveThreads / 32 * 2;

struct VqResolveParams {
  VqProblem problem;
  VqWorkspace workspace;
  VqErrorBound bound;
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
};

// Half a warp has a row. kSteps: those of vq_score_tensor_kernel, or 0 behind
// vq_score_float_kernel.
template <int kSteps>
__global__ void __launch_bounds__(kVqResolveThreads, kSteps <= 2 ? 7 : 5)
    vq_resolve_kernel(VqResolveParams params) {
  const VqProblem& problem = params.problem;
  const VqWorkspace& workspace = params.workspace;
  const int lane = static_cast<int>(threadIdx.x % 32), half = lane & 16, half_lane = lane & 15;
  const int64_t first_row =
      blockIdx.x * static_cast<int64_t>(kVqResolveRows) + static_cast<int>(threadIdx.x / 32) * 2;
  if (first_row >= problem.num_latents) return;
  const bool two = first_row + 1 < problem.num_latents;
  const int64_t rows[2] = {first_row, two ? first_row + 1 : first_row};
  const int64_t row = half == 0 ? rows[0] : rows[1];
  const int entries = static_cast<int>(problem.parts) * kVqSubgroups;
  const VqTop* tops = workspace.tops + row * entries;
  const auto load_top = [&](int entry) { return entry < entries ? tops[entry] : vq_no_top(); };

  ptx::griddepcontrol_wait();
  const double norm = workspace.latent_norms[row];  // NaN: no code is near
  VqTop top = load_top(half_lane);
  const VqDotProducts<kSteps> dot_products(problem, workspace, rows);
  const double largest_norm = problem.normalize ? kVqUnitNorm : *workspace.max_code_norm;
  const double magnitude = largest_norm * (norm + 0.5 * largest_norm);
  const double bound = params.bound.coefficient * magnitude + params.bound.constant;
  // Beyond, fp32 scores may have overflowed, and nothing can be ruled out.
  const bool settles = magnitude < kVqLargestMagnitude && bound < kVqLargestMagnitude;
  float maximum = top.values[0];
#pragma unroll 4
  for (int entry = half_lane + 16; entry < entries; entry += 16) {
    maximum = fmaxf(maximum, tops[entry].values[0]);
  }
#pragma unroll
  for (int other = 8; other > 0; other /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, other));
  }
  const float threshold = isnan(norm) ? INFINITY
                          : settles   ? static_cast<float>(maximum - 2 * bound)
                                      : -INFINITY;
  const auto half_ballot = [&](bool predicate) {
    return __ballot_sync(0xffffffffu, predicate) >> half & 0xffffu;
  };
  const auto reach = [&](float value) { return half_ballot(!(value < threshold)); };

  // Candidates are codes whose score reaches the threshold. Where a row has several, the groups are
  // gone through again to compare them.
  int index = -1, count = 0;
  VqNearest nearest{-static_cast<double>(INFINITY), 0};
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool comparing = pass == 1;
    if (comparing && !__any_sync(0xffffffffu, count > 1)) break;
    for (int base = 0; base < entries; base += 16) {
      if (base > 0 || comparing) top = load_top(base + half_lane);
      // Where all three maxima do, any group of the subgroup may.
      unsigned whole = reach(top.values[2]);
      unsigned groups = (reach(top.values[0]) & ~whole) | (reach(top.values[1]) & ~whole) << 16;
      while (__any_sync(0xffffffffu, (groups | whole) != 0)) {
        const bool one = groups != 0;
        const int bit = (__ffs(static_cast<int>(one ? groups : whole)) - 1) & 31;
        const uint32_t first = __shfl_sync(0xffffffffu, __float_as_uint(top.values[0]), bit, 16);
        const uint32_t second = __shfl_sync(0xffffffffu, __float_as_uint(top.values[1]), bit, 16);
        const unsigned part = __shfl_sync(0xffffffffu, top.part, bit, 16);
        int chunk = static_cast<int>(part >> 8) * kVqChunksPerStage;
        int end = chunk + static_cast<int>(part & 0xff) * kVqChunksPerStage;
        if (one) {
          chunk += static_cast<int>((bit < 16 ? first : second) & ((1u << kVqChunkBits) - 1));
          end = chunk + 1;
          groups &= groups - 1;
        } else if (whole != 0) {
          whole &= whole - 1;
        } else {
          end = 0;  // the other half has more
        }
        do {
          const bool active = chunk < end;
          const int first_code = (active ? chunk : 0) * kVqChunkCodes + bit % kVqSubgroups * 2;
          const int code = first_code + vq_code_of_group(vq_code_of_lane(lane));
          const float start = *workspace.start_of(code);
          const float score = dot_products(first_code) + start;
          const bool candidate = active && !(score < threshold);
          unsigned candidates = half_ballot(candidate);
          if (!comparing) {
            count += __popc(candidates);
            if (candidate) index = code;
          } else {
            while (__any_sync(0xffffffffu, candidates != 0)) {
              // Two of each half's.
              const unsigned rest = candidates & (candidates - 1);
              const unsigned own = half_lane >= kVqLanesPerRow && rest != 0 ? rest : candidates;
              const int source = (__ffs(static_cast<int>(own)) - 1) & 15;
              const int other = __shfl_sync(0xffffffffu, code, source, 16);
              const double exact = vq_exact_score(params, row, other);
              if (candidates != 0) nearest.take(exact, other);
              candidates = rest & (rest - 1);
            }
          }
          ++chunk;
        } while (__any_sync(0xffffffffu, chunk < end));
      }
    }
  }

  const unsigned holders = half_ballot(index >= 0);
  index = __shfl_sync(0xffffffffu, index, (__ffs(static_cast<int>(holders)) - 1) & 15, 16);
  const double score = __shfl_xor_sync(0xffffffffu, nearest.score, kVqLanesPerRow);
  nearest.take(score, __shfl_xor_sync(0xffffffffu, nearest.index, kVqLanesPerRow));
  if (count != 1) index = nearest.index;
  if (half_lane == 0 && (half == 0 || two)) params.indices[row] = index;
}

inline int64_t vq_resolve_blocks(const VqProblem& problem) {
  return divide_up(problem.num_latents, kVqResolveRows);
}

}  // namespace flexvar
