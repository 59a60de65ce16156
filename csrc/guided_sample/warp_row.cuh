// A row that one warp samples alone, for many rows: nothing waits for other warps, and what is done
// once for a row costs one warp's instructions. The row streams through registers, and the logits
// above a pivot stay in shared memory, in order. A histogram of these candidates holds counts and
// masses at once; in the bin where a limit is reached, tokens are ranked. A row that does not suit
// (infinities, a crowded bin, a sample that misleads twice) is marked for guided_sample_kernel.
#pragma once

#include "guided_sample/candidates.cuh"

namespace flexvar {

constexpr int kStretch = 1024;      // tokens: four times eight for each lane
constexpr int kMostStretches = 32;  // of a row: a lane knows where one begins
constexpr int kSegment = 128;       // candidates whose mass is summed together
constexpr int kSegmentRounds = kSegment / 32;
constexpr int kWarpBins = 256, kWarpBinsPerLane = kWarpBins / 32;
static_assert(kMaxCandidates <= 32 * kSegment);

// The candidates themselves lie behind it.
struct alignas(16) WarpRowStorage {
  Tally bins[kWarpBins + 1];  // the last one for what is no candidate
  // Candidates of a bin, in no order.
  float member_logits[32];
  int32_t member_places[32];

  __device__ float* candidates() { return reinterpret_cast<float*>(this + 1); }
};

// Eight logits of a row: rows begin at multiples of 16 bytes, and have a multiple of eight.
template <class T>
struct alignas(16) LogitOctet {
  T values[8];
};

// A lane's logits of a stretch: every 256th eight.
template <class T>
struct LaneStretch {
  static constexpr int kOctets = 4;
  LogitOctet<T> octets[kOctets];
  int32_t begin, end;  // of the first octet, of the row

  // Of the row's logits from `begin` on, as far as there are any.
  __device__ void load(const T* logits, int32_t n, int32_t stretch) {
    begin = stretch * kStretch + static_cast<int32_t>(threadIdx.x) % 32 * 8;
    end = n;
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (has(i)) octets[i] = *reinterpret_cast<const LogitOctet<T>*>(logits + begin + i * 256);
    }
  }
  __device__ bool has(int i) const { return begin + i * 256 < end; }
};

// How many logits are above the floor, which is not -0. NaN is not.
template <class T>
__device__ inline uint32_t count_above(const LogitOctet<T>& octet, float floor) {
  uint32_t count = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    count += ptx::difference_bits(floor, to_float(octet.values[e])) >> 31;
  }
  return count;
}

// What list_candidates found.
struct CandidateCount {
  int32_t all;
  int32_t before;  // this lane's stretch
};

// Lists the logits above the pivot; with more than `capacity` the list is of no use. Otherwise -inf
// fills the last segment.
template <class T>
__device__ inline CandidateCount list_candidates(const T* logits, int32_t n, float pivot,
                                                 int32_t capacity, WarpRowStorage& shared) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  CandidateCount count{0, 0};
  ptx::ListEnd list(shared.candidates());
  LaneStretch<T> mine{};
#pragma unroll 1
  for (int32_t stretch = 0; stretch * kStretch < n; ++stretch) {
    mine.load(logits, n, stretch);
    ptx::prefetch(logits + min((stretch + 1) * kStretch + lane * (kStretch / 32), n - 1));
    if (lane == stretch) count.before = count.all;
#pragma unroll
    for (int i = 0; i < mine.kOctets; i += 2) {  // two octets' numbers share a word
      const float first = mine.has(i) ? pivot : INFINITY;
      const float second = mine.has(i + 1) ? pivot : INFINITY;
      const uint32_t own =
          count_above(mine.octets[i], first) | count_above(mine.octets[i + 1], second) << 16;
      const uint32_t until = ptx::warp_inclusive_sum(own);
      const uint32_t before = until - own, both = __shfl_sync(0xffffffffu, until, 31);
      const uint32_t firsts = both & 0xffff, seconds = both >> 16;
      count.all += static_cast<int32_t>(firsts + seconds);
      if (count.all > capacity) continue;
      ptx::ListEnd end = list.behind(before & 0xffff);
#pragma unroll
      for (T logit : mine.octets[i].values) end.append_above(first, to_float(logit));
      end = list.behind(firsts + (before >> 16));
#pragma unroll
      for (T logit : mine.octets[i + 1].values) end.append_above(second, to_float(logit));
      list = list.behind(firsts + seconds);
    }
  }
  if (count.all <= capacity) {
    const int32_t end = (count.all + kSegment - 1) / kSegment * kSegment;
    for (int32_t i = count.all + lane; i < end; i += 32) shared.candidates()[i] = -INFINITY;
  }
  __syncwarp();
  return count;
}

// The mass of a row whose largest logit is `maximum`.
template <class T>
__device__ inline int64_t mass_of_row(const T* logits, int32_t n, float maximum) {
  int64_t mass = 0;
  LaneStretch<T> mine{};
#pragma unroll 1
  for (int32_t stretch = 0; stretch * kStretch < n; ++stretch) {
    mine.load(logits, n, stretch);
#pragma unroll
    for (int i = 0; i < mine.kOctets; ++i) {
      if (!mine.has(i)) continue;
      uint32_t weights[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        weights[e] = token_weight(to_float(mine.octets[i].values[e]), maximum);
      }
      mass += weights[0] + weights[1] + weights[2];  // at most 3 * 2^30
      mass += weights[3] + weights[4] + weights[5];
      mass += weights[6] + weights[7];
    }
  }
  return warp_sum(mass);
}

struct WarpCandidates {
  WarpRowStorage& shared;
  int32_t count;
  float maximum, scale;

  // A candidate's bin is the whole part of this: there are more bins where logits are denser, close
  // to the pivot. `scale` takes the distance from the largest logit to the pivot to a little less
  // than the fourth root of the number of bins.
  __device__ float position(float logit) const {
    const float distance = (logit - maximum) * scale;
    const float square = distance * distance;
    return square * square;
  }

  // use(logits, begin) for each segment: every 32nd of its candidates from begin + lane on. Behind
  // the last one there is -inf, which has a position behind all bins.
  template <class Use>
  __device__ void for_each_segment(Use use) const {
    const float* const candidates = shared.candidates() + static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int32_t begin = 0; begin < count; begin += kSegment) {
      float logits[kSegmentRounds];
#pragma unroll
      for (int i = 0; i < kSegmentRounds; ++i) logits[i] = candidates[begin + i * 32];
      use(logits, begin);
    }
  }
};

// Fills the bins, and returns those of this lane.
__device__ inline LaneBins fill_bins(const WarpCandidates& list) {
  WarpRowStorage& shared = list.shared;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int b = lane; b <= kWarpBins; b += 32) shared.bins[b] = Tally{0, 0};
  __syncwarp();
  list.for_each_segment([&](const float (&logits)[kSegmentRounds], int32_t) {
#pragma unroll
    for (float logit : logits) {
      const Tally tally = tally_of(token_weight(logit, list.maximum));
      Tally& total = shared.bins[__float2uint_rz(fminf(list.position(logit), kWarpBins))];
      atomicAdd(&total.count_and_low, tally.count_and_low);
      atomicAdd(&total.high, tally.high);
    }
  });
  __syncwarp();
  Tally own{0, 0};
#pragma unroll
  for (int b = 0; b < kWarpBinsPerLane; ++b) own = own + shared.bins[lane * kWarpBinsPerLane + b];
  return {warp_inclusive_sum(own) - own, own};
}

// Of the candidates in descending order, the first with which the tally up to it reaches `limit`.
// Not found where candidates have too little, or too many of them share a bin. kLast: all up to it
// are kept, and `segment_mass` becomes the mass of those that are in this lane's segment.
template <bool kLast>
__device__ inline CandidateCut cut_list(const WarpCandidates& list, const LaneBins& bins,
                                        int64_t limit, Quantity quantity, int64_t& segment_mass) {
  constexpr CandidateCut kNotFound{0, -1, {0, 0}};
  WarpRowStorage& shared = list.shared;
  const int lane = threadIdx.x % 32;
  const int row = first_lane(amount(bins.before + bins.own, quantity) >= limit);
  if (row < 0) return kNotFound;
  const Tally own =
      lane < kWarpBinsPerLane ? shared.bins[row * kWarpBinsPerLane + lane] : Tally{0, 0};
  const Tally until = from_lane(bins.before, row) + warp_inclusive_sum(own);
  const int column = first_lane(amount(until, quantity) >= limit);
  const auto members = static_cast<int>(from_lane(own, column).count());
  Tally front = from_lane(until - own, column);
  if (members > 32) return kNotFound;

  __syncwarp();  // the cut before may still read its members
  const auto bin = static_cast<float>(row * kWarpBinsPerLane + column);
  int seen = 0;
  list.for_each_segment([&](const float (&logits)[kSegmentRounds], int32_t begin) {
    int64_t mass = 0;
    unsigned these[kSegmentRounds];
#pragma unroll
    for (int i = 0; i < kSegmentRounds; ++i) {
      const float position = list.position(logits[i]);
      these[i] = __ballot_sync(0xffffffffu, position >= bin && position < bin + 1);
      if (kLast) mass += token_weight(position < bin ? logits[i] : -INFINITY, list.maximum);
    }
#pragma unroll
    for (int i = 0; i < kSegmentRounds; ++i) {
      if (these[i] == 0) continue;
      if (these[i] >> lane & 1) {
        const int member = seen + __popc(these[i] & ((1u << lane) - 1));
        shared.member_logits[member] = logits[i];
        shared.member_places[member] = begin + i * 32 + lane;
      }
      seen += __popc(these[i]);
    }
    if (kLast) {
      const auto low = ptx::warp_sum(static_cast<uint32_t>(mass) & 0xffff);
      const auto high = ptx::warp_sum(static_cast<uint32_t>(mass >> 16));
      if (lane == begin / kSegment) segment_mass = (int64_t{high} << 16) + low;
    }
  });
  __syncwarp();

  const float logit = lane < members ? shared.member_logits[lane] : -INFINITY;
  const int32_t place = lane < members ? shared.member_places[lane] : 0;
  const uint32_t weight = token_weight(logit, list.maximum);
#pragma unroll 1
  for (int member = 0; member < members; ++member) {
    const float other_logit = __shfl_sync(0xffffffffu, logit, member);
    const int32_t other_place = __shfl_sync(0xffffffffu, place, member);
    const uint32_t other_weight = __shfl_sync(0xffffffffu, weight, member);
    if (other_logit > logit || (other_logit == logit && other_place < place)) {
      front = front + tally_of(other_weight);
    }
  }
  const Tally kept = front + tally_of(weight);
  const bool is_kept = lane < members && amount(front, quantity) < limit;
  const int last = first_lane(is_kept && amount(kept, quantity) >= limit);
  if (kLast) {
#pragma unroll 1
    for (int member = 0; member < members; ++member) {
      const uint32_t more = __shfl_sync(0xffffffffu, is_kept ? weight : 0, member);
      if (lane == __shfl_sync(0xffffffffu, place, member) / kSegment) segment_mass += more;
    }
  }
  return {__shfl_sync(0xffffffffu, logit, last), __shfl_sync(0xffffffffu, place, last),
          from_lane(kept, last)};
}

// The place of the candidate at `target` in the mass of those up to the cut.
__device__ inline int32_t find_drawn(const WarpCandidates& list, const CandidateCut& cut,
                                     int64_t segment_mass, int64_t target) {
  const int lane = threadIdx.x % 32;
  const int64_t segments_until = warp_inclusive_sum(segment_mass);
  const int segment = first_lane(segments_until > target);
  int64_t left = target - __shfl_sync(0xffffffffu, segments_until - segment_mass, segment);
#pragma unroll 1
  for (int32_t begin = segment * kSegment;; begin += 32) {
    const int32_t place = begin + lane;
    const float logit = place < list.count ? list.shared.candidates()[place] : -INFINITY;
    const bool is_kept = logit > cut.logit || (logit == cut.logit && place <= cut.place);
    const uint32_t weight = is_kept ? token_weight(logit, list.maximum) : 0;
    const Tally until = warp_inclusive_sum(Tally{weight & 1023, weight >> 10});
    const int reached = first_lane(until.mass() > left);
    if (reached >= 0) return begin + reached;
    left -= from_lane(until, 31).mass();
  }
}

// The token that is the candidate at `place`, by its lane; -2 by the others.
template <class T>
__device__ inline int32_t token_of_candidate(const T* logits, int32_t n, float pivot, int32_t place,
                                             const CandidateCount& count) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const bool is_before = lane * kStretch < n && count.before <= place;
  const int stretch = __popc(__ballot_sync(0xffffffffu, is_before)) - 1;
  int32_t before = __shfl_sync(0xffffffffu, count.before, stretch), token = -2;
  LaneStretch<T> mine{};
  mine.load(logits, n, stretch);
#pragma unroll
  for (int i = 0; i < mine.kOctets; ++i) {
    const float floor = mine.has(i) ? pivot : INFINITY;
    const auto own = static_cast<int32_t>(count_above(mine.octets[i], floor));
    const int32_t until = before + warp_inclusive_sum(own);
    int32_t number = until - own;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const bool is_candidate = to_float(mine.octets[i].values[e]) > floor;
      if (is_candidate && number == place) token = mine.begin + i * 256 + e;
      number += is_candidate;
    }
    before = __shfl_sync(0xffffffffu, until, 31);
  }
  return token;
}

// Draws a row's token from the logits above a pivot, if it can: returned by one lane, -2 by the
// others; kUnsuited by all of them where it cannot, with a `rank` of another pivot to try.
template <class T>
__device__ inline int32_t draw_above_pivot(const GuidedSampleCudaParams<T>& params, uint32_t row,
                                           const T* logits, int32_t& rank, WarpRowStorage& shared) {
  const int32_t n = params.vocabulary, capacity = params.capacity;
  ptx::prefetch(logits + static_cast<int>(threadIdx.x) % 32 * (kStretch / 32));
  const float pivot = find_pivot(load_pivot_sample(logits, n), rank) + 0.0f;  // not -0
  const CandidateCount count = list_candidates(logits, n, pivot, capacity, shared);
  // The sample may mislead, by as much as the count tells.
  const auto choose_rank_for = [&](float candidates) {
    const float better = static_cast<float>(rank) * candidates / static_cast<float>(count.all);
    rank = max(1, static_cast<int32_t>(fminf(better, kPivotSample - 1)));
    return kUnsuited;
  };
  if (count.all < max(params.top_k, 1) || count.all > capacity) {
    return choose_rank_for(static_cast<float>(rank) * static_cast<float>(n) / kPivotSample);
  }

  WarpCandidates list{shared, count.all, -INFINITY, 0};
  float maximum = -INFINITY;
  list.for_each_segment([&](const float (&logits)[kSegmentRounds], int32_t) {
#pragma unroll
    for (float logit : logits) maximum = fmaxf(maximum, logit);
  });
  list.maximum = warp_largest(maximum);
  const float range = list.maximum - pivot;
  if (!(range > 1e-30f && range < 1e4f)) return kUnsuited;  // infinities, all the same
  list.scale = __fdividef(3.9999f, range);

  const LaneBins bins = fill_bins(list);
  const bool nucleus = params.top_p > 0 && params.top_p < 1;
  int64_t segment_mass = 0, limit = params.top_k;
  if (nucleus) {
    int64_t all = 0;
    if (params.top_k > 0) {
      const CandidateCut cut = cut_list<false>(list, bins, limit, Quantity::count, segment_mass);
      if (cut.place < 0) return kUnsuited;
      all = cut.kept.mass();
    } else {
      all = mass_of_row(logits, n, list.maximum);
    }
    limit = min(mass_limit(all, params.top_p), all);
  }
  const Quantity quantity = nucleus ? Quantity::mass : Quantity::count;
  const CandidateCut cut = cut_list<true>(list, bins, limit, quantity, segment_mass);
  // If these were too few for top-p, then more, as far as there is room.
  if (cut.place < 0) return choose_rank_for(0.8f * static_cast<float>(capacity));
  const int64_t target = scaled_draw(row_number(params, row), cut.kept.mass());
  const int32_t place = find_drawn(list, cut, segment_mass, target);
  return token_of_candidate(logits, n, pivot, place, count);
}

// A block is a warp, and has a row.
template <class T>
__global__ void __launch_bounds__(32) guided_sample_warp_kernel(GuidedSampleCudaParams<T> params) {
  auto& shared = *dynamic_shared<WarpRowStorage>();
  const uint32_t row = blockIdx.x;
  const T* const logits = params.logits + int64_t{row} * params.vocabulary;
  int32_t rank = params.pivot_rank, token = kUnsuited;
#pragma unroll 1
  for (int attempt = 0; attempt < 2 && token == kUnsuited; ++attempt) {
    token = draw_above_pivot(params, row, logits, rank, shared);
    __syncwarp();
  }
  if (token == kUnsuited) {
    if (threadIdx.x == 0) params.tokens[row] = kLeftToBlocks;
  } else if (token >= 0) {
    params.tokens[row] = token;
  }
}

}  // namespace flexvar
