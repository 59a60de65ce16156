// What all ways of sampling a row on CUDA share: arguments, a block's memory, sums over a warp.
#pragma once

#include <cmath>

#include "common/ptx.cuh"
#include "guided_sample/arithmetic.h"

namespace flexvar {

constexpr int kSampleMostWarps = 16;
constexpr int kSamplePieces = 9;   // of four logits: the most of a row that falls to a thread
constexpr int kPivotSample = 512;  // logits that the pivot is estimated from
constexpr int kPivotSlack = 5;     // how many more of these may be above it
constexpr int kMaxCandidates = 2016;
constexpr double kRoomDeviations = 2.5;  // of the candidates that a warp alone has room for
// For each warp's candidates. A row may fill 14 of 16 warps, which then have about 100 each, and
// one of them in a few hundred rows more than 160. For more of 8 warps' there is no shared memory.
template <int kWarps>
constexpr int kCandidatePlaces = kWarps <= 8 ? 256 : 192;
constexpr int kSampleBins = 512, kBinsPerLane = kSampleBins / 32;
// Tokens that are further below the largest logit weigh nothing.
constexpr float kSampleReach = 22;

template <class T>
struct GuidedSampleCudaParams {
  const T* logits;           // [B * l, V]
  const int64_t* seeds;      // [B]
  const int64_t* image_ids;  // [B]
  int64_t* tokens;           // [B * l]
  int64_t step;
  double top_p;        // 0: off
  uint32_t rows;       // B * l
  uint32_t length;     // l
  int32_t vocabulary;  // V
  int32_t top_k;       // 0 (off) to V - 1
  int32_t pivot_rank;  // see guided_sample_pivot_rank
  int32_t pieces;      // of four logits for each thread, odd; 0: the row stays in global memory
  int32_t capacity;    // candidates that a warp that has a row alone has room for
  bool only_left;      // only the rows whose token is kLeftToBlocks are sampled
};
// Instead of the token of a row that a warp alone cannot sample.
constexpr int64_t kLeftToBlocks = INT64_MIN;

// The pieces of a row that fall to each of a block's threads. Odd, so that threads that read their
// pieces side by side find them in different banks of shared memory. 0: the row is too long.
inline int32_t guided_sample_pieces(int64_t vocabulary, int threads) {
  const int64_t pieces = (vocabulary + 4 * threads - 1) / (4 * threads) | 1;
  return pieces <= kSamplePieces ? static_cast<int32_t>(pieces) : 0;
}

// The pivot's place in the sample of a row, from the largest: such that at least top_k logits are
// above it, but for rows that deviate from the mean by more than so many standard deviations. 0: no
// pivot, because all logits matter or candidates would be too many.
inline int32_t guided_sample_pivot_rank(int64_t vocabulary, int64_t top_k, double top_p, int sample,
                                        double deviations) {
  const bool nucleus = top_p > 0 && top_p < 1;
  if ((top_k == 0 && !nucleus) || vocabulary < 2 * kPivotSample) return 0;
  const auto size = static_cast<double>(vocabulary);
  if (top_k == 0) {  // as many candidates as there is room for, mostly
    return static_cast<int32_t>(sample * fmin(0.7 * kMaxCandidates / size, 0.9));
  }
  const double share = static_cast<double>(top_k) / size;
  const double deviation = std::sqrt(sample * share * (1 - share));
  const double rank = sample * share + deviations * deviation + 2;
  const double most = (rank + kPivotSlack + 2.5 * deviation) / sample * size;
  return most <= kMaxCandidates ? static_cast<int32_t>(rank) : 0;
}

// Room for the candidates above such a pivot of most rows: an odd multiple of 64.
inline int32_t guided_sample_capacity(int64_t vocabulary, int32_t rank, int64_t top_k, int sample) {
  const double most = rank + kPivotSlack + kRoomDeviations * std::sqrt(rank);
  const double candidates = fmax(576, most / sample * static_cast<double>(vocabulary));
  const auto room =
      static_cast<int32_t>(top_k == 0 ? kMaxCandidates : fmin(candidates, kMaxCandidates));
  return ((room / 64 - 1) | 1) * 64;
}

template <class T>
__device__ inline uint64_t row_number(const GuidedSampleCudaParams<T>& params, uint32_t row) {
  const uint32_t image = row / params.length;
  return random_number(params.seeds[image], params.image_ids[image], params.step,
                       row - image * params.length);
}

// Number and mass of up to kMaxCandidates tokens, in two words that add up without carries.
struct Tally {
  uint32_t count_and_low;  // number << 21 | sum of the weights' low 10 bits
  uint32_t high;           // sum of the weights' other bits
  __device__ uint32_t count() const { return count_and_low >> 21; }
  __device__ int64_t mass() const { return (int64_t{high} << 10) + (count_and_low & 0x1fffff); }
};
static_assert(kMaxCandidates < 1 << 11 && kMaxCandidates * 1023 < 1 << 21);

__device__ inline Tally tally_of(uint32_t weight) {
  return {1u << 21 | (weight & 1023), weight >> 10};
}
__device__ inline Tally operator+(Tally a, Tally b) {
  return {a.count_and_low + b.count_and_low, a.high + b.high};
}
__device__ inline Tally operator-(Tally a, Tally b) {
  return {a.count_and_low - b.count_and_low, a.high - b.high};
}

// A part of a whole row's logits: see measure.
struct Measure {
  int64_t sum;
  float least, greatest;
};

struct alignas(16) SampleStorage {
  // A lane's bins are apart from the next one's: two behind them keep both in other banks.
  alignas(16) Tally bins[32][kBinsPerLane + 2];
  alignas(16) int32_t heads[kSampleBins];  // of lists of the candidates in a bin; -1: none
  int32_t counts[kSampleMostWarps];
  float largest[kSampleMostWarps];
  Tally tallies[kSampleMostWarps];
  Measure measures[kSampleMostWarps];
  int64_t sums[kSampleMostWarps];
  uint64_t number;  // random
  int64_t target, kept_mass;
  float pivot, cut_logit;
  int32_t cut_end, ties, warp;
  unsigned left[kSampleMostWarps];  // marks of rows, see find_left_rows
};

template <int kWarps>
struct CandidateStorage : SampleStorage {
  static constexpr int kPlaces = kCandidatePlaces<kWarps>;  // of a warp
  float candidates[kWarps * kPlaces];  // in order of indices, every warp's from a place of its own
  uint16_t next[kWarps * kPlaces];     // the next in the same list; until then a candidate's index
};

// The sum over the lanes up to this one.
__device__ inline int64_t warp_inclusive_sum(int64_t sum) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, lanes);
    if (static_cast<int>(threadIdx.x) % 32 >= lanes) sum += other;
  }
  return sum;
}
__device__ inline int32_t warp_inclusive_sum(int32_t sum) {
  return static_cast<int32_t>(ptx::warp_inclusive_sum(static_cast<uint32_t>(sum)));
}
__device__ inline Tally warp_inclusive_sum(Tally sum) {
  return {ptx::warp_inclusive_sum(sum.count_and_low), ptx::warp_inclusive_sum(sum.high)};
}
__device__ inline Tally warp_sum(Tally sum) {
  return {ptx::warp_sum(sum.count_and_low), ptx::warp_sum(sum.high)};
}
__device__ inline Tally from_lane(Tally tally, int lane) {
  return {__shfl_sync(0xffffffffu, tally.count_and_low, lane),
          __shfl_sync(0xffffffffu, tally.high, lane)};
}
__device__ inline int64_t warp_sum(int64_t sum) {
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}
__device__ inline float warp_largest(float largest) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  return largest;
}
// The first lane for which `condition` holds, or -1.
__device__ inline int first_lane(bool condition) {
  return __ffs(static_cast<int>(__ballot_sync(0xffffffffu, condition))) - 1;
}

}  // namespace flexvar
