// A row that one warp samples alone, for many rows: nothing waits for other warps, and what is done
// once for a row costs one warp's instructions. The row streams through registers, and the logits
// above a pivot stay in shared memory, in order; what comes first tells the pivot. A histogram of
// these candidates holds counts and masses at once; in the bins where limits are reached, tokens
// are ranked. A row that does not suit (infinities, a crowded bin, two samples that mislead) is
// marked for guided_sample_kernel.
#pragma once

#include "guided_sample/warp_list.cuh"

namespace flexvar {

constexpr int kWarpBins = 224, kWarpBinsPerLane = kWarpBins / 32;
constexpr float kWarpBinsRoot = 3.866f;  // less than the fourth root of kWarpBins - 0.5
constexpr int kMostMembers = 32;         // of bins that are ranked: one for each lane

// The candidates themselves lie behind it.
struct alignas(16) WarpRowStorage {
  // Tallies: the two words apart, so that bins side by side are in as many banks.
  // The last one is for what is no candidate.
  uint32_t count_and_low[kWarpBins + 1], high[kWarpBins + 1];
  // Candidates of the bins that are ranked, in no order.
  struct Member {
    float logit;
    uint32_t weight;
  };
  Member members[kMostMembers];
  uint16_t places[kMostMembers];

  __device__ Tally bin(int i) const { return {count_and_low[i], high[i]}; }
  template <class T>
  __device__ T* candidates() {
    return reinterpret_cast<T*>(this + 1);
  }
};

template <class T>
struct WarpCandidates {
  WarpRowStorage& shared;
  int32_t pairs;  // of each lane
  float maximum, scale;

  // A candidate's bin: there are more of them where logits are denser, close to the pivot. `scale`
  // takes the distance from the largest logit to the pivot to kWarpBinsRoot. What is added leaves
  // the rounded number in a float's lowest bits. For what is no candidate it is kWarpBins.
  __device__ uint32_t bin(float logit) const {
    const float distance = (logit - maximum) * scale;
    const float square = distance * distance;
    const uint32_t number = __float_as_uint(__fmaf_rn(square, square, 0x1p23f)) - 0x4b000000u;
    return min(number, uint32_t{kWarpBins});
  }

  __device__ const CandidatePair<T>& pair(int32_t i) const {
    return reinterpret_cast<const CandidatePair<T>*>(shared.candidates<T>())[i];
  }
  // use(pair, which one it is) for this lane's pairs, in order. Behind the last candidate there is
  // -inf.
  template <class Use>
  __device__ void for_each_pair(Use use) const {
    const int32_t begin = static_cast<int32_t>(threadIdx.x) % 32 * pairs;
#pragma unroll 2
    for (int32_t i = 0; i < pairs; ++i) use(pair(begin + i), i);
  }
};

// Fills the bins, and returns those of this lane.
template <class T>
__device__ inline LaneBins fill_bins(const WarpCandidates<T>& list) {
  WarpRowStorage& shared = list.shared;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int b = lane; b <= kWarpBins; b += 32) shared.count_and_low[b] = shared.high[b] = 0;
  __syncwarp();
  list.for_each_pair([&](CandidatePair<T> pair, int32_t) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Tally tally = tally_of(token_weight(pair.logit(e), list.maximum));
      const uint32_t bin = list.bin(pair.logit(e));
      atomicAdd(&shared.count_and_low[bin], tally.count_and_low);
      atomicAdd(&shared.high[bin], tally.high);
    }
  });
  __syncwarp();
  Tally own{0, 0};
#pragma unroll
  for (int b = 0; b < kWarpBinsPerLane; ++b) own = own + shared.bin(lane * kWarpBinsPerLane + b);
  return {warp_inclusive_sum(own) - own, own};
}

// A bin, and those in front of it; -1: none.
struct WarpBin {
  int32_t index;
  Tally front, own;
  __device__ int32_t members() const { return static_cast<int32_t>(own.count()); }
  // The mass of its members up to the `count`-th candidate, about.
  __device__ int64_t mass_of(int64_t count) const {
    const auto some = static_cast<float>(count - front.count());
    const float share = __fdividef(some, static_cast<float>(own.count()));
    const auto mass = static_cast<int64_t>(static_cast<float>(own.mass()) * share);
    return min(mass, own.mass());
  }
};

// The bin in which the tally of the candidates in descending order reaches `limit`.
__device__ inline WarpBin find_bin(const WarpRowStorage& shared, const LaneBins& bins,
                                   int64_t limit, Quantity quantity) {
  const int lane = threadIdx.x % 32;
  const int row = first_lane(amount(bins.before + bins.own, quantity) >= limit);
  if (warp_agrees(row < 0)) return {-1, {0, 0}, {0, 0}};
  const Tally own =
      lane < kWarpBinsPerLane ? shared.bin(row * kWarpBinsPerLane + lane) : Tally{0, 0};
  const Tally until = from_lane(bins.before, row) + warp_inclusive_sum(own);
  const int column = first_lane(amount(until, quantity) >= limit);
  return {row * kWarpBinsPerLane + column, from_lane(until - own, column), from_lane(own, column)};
}

// What a lane knows of the members of one or two bins: one of them, and which ones it has found.
struct LaneMember {
  float logit;
  int32_t place;  // -1: none
  uint32_t weight;
  Tally ahead;          // of the members in front of it
  uint32_t found;       // a bit for each member that is in this lane's pairs
  int64_t mass_before;  // of this lane's pairs, in front of the second bin
};

// Ranks the members of two bins (or of one, given twice), kMostMembers at most.
template <class T>
__device__ inline LaneMember rank_members(const WarpCandidates<T>& list, const WarpBin& first,
                                          const WarpBin& second) {
  WarpRowStorage& shared = list.shared;
  const int lane = threadIdx.x % 32;
  LaneMember mine{-INFINITY, -1, 0, {0, 0}, 0, 0};
  const auto first_bin = static_cast<uint32_t>(first.index);
  const auto second_bin = static_cast<uint32_t>(second.index);
  // This lane's members: a bit for each pair, whether its first is one and whether its second is.
  uint32_t marks[2]{0, 0};
  list.for_each_pair([&](CandidatePair<T> pair, int32_t i) {
    uint32_t before = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t bin = list.bin(pair.logit(e));
      const uint32_t weight = token_weight(pair.logit(e), list.maximum);
      before += bin < second_bin ? weight : 0;
      marks[e] |= static_cast<uint32_t>((bin == first_bin) | (bin == second_bin)) << i;
    }
    mine.mass_before += before;  // at most 2 * 2^30
  });
  const int32_t own = __popc(marks[0]) + __popc(marks[1]), until = warp_inclusive_sum(own);
  const int32_t members = __shfl_sync(0xffffffffu, until, 31);
  int32_t member = until - own;
  __syncwarp();  // the ranking before may still read its members
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll 1
    for (; marks[e] != 0; marks[e] &= marks[e] - 1) {
      const int32_t pair = lane * list.pairs + __ffs(static_cast<int>(marks[e])) - 1;
      shared.places[member] = static_cast<uint16_t>(pair * 2 + e);
      mine.found |= 1u << member++;
    }
  }
  __syncwarp();
  if (lane < members) {
    mine.place = shared.places[lane];
    mine.logit = to_float(shared.candidates<T>()[mine.place]);
    mine.weight = token_weight(mine.logit, list.maximum);
    shared.members[lane] = {mine.logit, mine.weight};
  }
  __syncwarp();

#pragma unroll 2
  for (int member = 0; member < members; ++member) {
    const WarpRowStorage::Member other = shared.members[member];
    const int32_t other_place = shared.places[member];
    const bool is_tie_ahead = (other.logit == mine.logit) & (other_place < mine.place);
    if ((other.logit > mine.logit) | is_tie_ahead) {
      mine.ahead = mine.ahead + tally_of(other.weight);
    }
  }
  return mine;
}

// Of the members in descending order, the first with which the tally reaches `limit`. `front` is
// the tally in front of them. `is_kept`: whether this lane's member is up to it.
__device__ inline CandidateCut cut_members(const LaneMember& mine, Tally front, int64_t limit,
                                           Quantity quantity, bool& is_kept) {
  front = front + mine.ahead;
  const Tally kept = front + tally_of(mine.weight);
  is_kept = mine.place >= 0 && amount(front, quantity) < limit;
  const int last = first_lane(is_kept && amount(kept, quantity) >= limit);
  return {__shfl_sync(0xffffffffu, mine.logit, last), __shfl_sync(0xffffffffu, mine.place, last),
          from_lane(kept, last)};
}

// The place of the candidate at `target` in the mass of those up to the cut, of which `mass` is in
// this lane's pairs.
template <class T>
__device__ inline int32_t find_drawn(const WarpCandidates<T>& list, const CandidateCut& cut,
                                     int64_t mass, int64_t target) {
  const int lane = threadIdx.x % 32;
  const Tally own{static_cast<uint32_t>(mass) & 1023, static_cast<uint32_t>(mass >> 10)};
  const Tally lanes_until = warp_inclusive_sum(own);
  const int found = first_lane(lanes_until.mass() > target);
  const int64_t left = target - from_lane(lanes_until - own, found).mass();
  // Each of the found lane's pairs to a lane.
  const int32_t place = (found * list.pairs + lane) * 2;
  uint32_t weights[2]{0, 0};
  if (lane < list.pairs) {
    const CandidatePair<T> pair = list.pair(found * list.pairs + lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float logit = pair.logit(e);
      const bool is_kept = logit > cut.logit || (logit == cut.logit && place + e <= cut.place);
      weights[e] = is_kept ? token_weight(logit, list.maximum) : 0;
    }
  }
  const Tally both{(weights[0] & 1023) + (weights[1] & 1023),
                   (weights[0] >> 10) + (weights[1] >> 10)};
  const Tally until = warp_inclusive_sum(both);
  const int reached = first_lane(until.mass() > left);
  const bool is_second = left - (until - both).mass() >= weights[0];
  return __shfl_sync(0xffffffffu, place + is_second, reached);
}
static_assert(kMaxCandidates / 64 <= 32);

// The token that is the candidate at `place`, by one lane; -2 by the others.
template <class T>
__device__ inline int32_t token_of_candidate(const T* logits, int32_t n, uint32_t pivot,
                                             int32_t place, const CandidateCount& count) {
  using Mine = LaneStretch<T>;
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const bool is_before = lane * kStretch < n && count.before <= place;
  const int stretch = __popc(__ballot_sync(0xffffffffu, is_before)) - 1;
  auto number = static_cast<uint32_t>(place - __shfl_sync(0xffffffffu, count.before, stretch));
  uint32_t begins[Mine::kUnits + 1];
  StretchSums<T>(__shfl_sync(0xffffffffu, count.sums[0], stretch),
                 __shfl_sync(0xffffffffu, count.sums[1], stretch))
      .find_begins(begins);
  // In which 32 units, and as which of their candidates.
  int unit = 0;
  uint32_t begin = 0;
#pragma unroll
  for (int i = 1; i < Mine::kUnits; ++i) {
    if (number >= begins[i]) {
      unit = i;
      begin = begins[i];
    }
  }
  number -= begin;
  const int32_t first = Mine::begin(n, stretch) + unit * Mine::kStep;
  const auto logits_here = *reinterpret_cast<const LogitUnit<T>*>(logits + first);
  uint32_t above = 0;  // a bit for each logit
  if (first >= stretch * kStretch) {
#pragma unroll
    for (int e = 0; e < Mine::kLogits; ++e) {
      if (logits_here.logit(e) > logit_of_word<T>(pivot, 0)) above |= 1u << e;
    }
  }
  const auto own = static_cast<uint32_t>(__popc(above));
  number -= ptx::warp_inclusive_sum(own) - own;
  int32_t token = -2;
#pragma unroll
  for (int e = 0; e < Mine::kLogits; ++e) {
    const bool is_above = above >> e & 1;
    if (is_above && number == 0) token = first + e;
    number -= is_above;
  }
  return token;
}

// The pivot that a row was tried with, and how many times as many candidates it should have.
struct TriedPivot {
  uint32_t pivot;
  float change;  // 0: none was tried
};

// Draws a row's token from the logits above a pivot, if it can: returned by one lane, -2 by the
// others; kUnsuited by all of them where it cannot, and `tried` then helps to find another pivot.
template <class T>
__device__ inline int32_t draw_above_pivot(const GuidedSampleCudaParams<T>& params, uint32_t row,
                                           const T* logits, TriedPivot& tried,
                                           WarpRowStorage& shared) {
  const int32_t n = params.vocabulary, capacity = params.capacity;
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  // The first stretch serves as the sample, so that nothing is read for that alone. Where it
  // misleads, a sample of the whole row tells how to change the pivot.
  LaneStretch<T> mine;
  const bool is_first = warp_agrees(tried.change == 0);
  int32_t rank = params.pivot_rank;
  if (is_first) {
#pragma unroll
    for (int stretch = 1; stretch < kStretchesAhead; ++stretch) {
      ptx::prefetch(logits + min(stretch * kStretch + lane * (kStretch / 32), n - 1));
    }
    mine.load(logits, n, 0);
  } else {
    mine.load_sample(logits, n);
    const auto above = static_cast<float>(ptx::warp_sum(mine.count_above(tried.pivot).sum()));
    rank = max(1, static_cast<int32_t>(fminf(above * tried.change, kStretch - 1)));
  }
  const uint32_t pivot = find_pivot(mine, rank);
  if (!is_first) mine.load(logits, n, 0);
  const CandidateCount count =
      list_candidates(logits, n, pivot, capacity, mine, shared.candidates<T>());
  const auto unsuited_but_with = [&](float candidates) {
    tried = {pivot, candidates / static_cast<float>(count.all)};
    return kUnsuited;
  };
  if (count.all < max(params.top_k, 1) || count.all > capacity) {
    const float share = static_cast<float>(params.pivot_rank) / kStretch;
    return unsuited_but_with(share * static_cast<float>(n));
  }

  WarpCandidates<T> list{shared, candidate_pairs_per_lane(count.all), -INFINITY, 0};
  float maximum = -INFINITY;
  list.for_each_pair([&](CandidatePair<T> pair, int32_t) {
    maximum = fmaxf(maximum, fmaxf(pair.logit(0), pair.logit(1)));
  });
  list.maximum = warp_largest(maximum);
  const float range = list.maximum - logit_of_word<T>(pivot, 0);
  if (!warp_agrees(range > 1e-30f && range < 1e4f)) return kUnsuited;  // infinities, all the same
  list.scale = __fdividef(kWarpBinsRoot, range);

  const LaneBins bins = fill_bins(list);
  const bool nucleus = params.top_p > 0 && params.top_p < 1;
  const Quantity quantity = nucleus ? Quantity::mass : Quantity::count;
  // Top-p's limit is known only when top-k's bin is ranked. A guess at it mostly tells the bin in
  // which it is reached, and both are ranked together.
  int64_t limit = params.top_k;
  WarpBin top_k{-1, {0, 0}, {0, 0}};
  if (params.top_k > 0) {
    top_k = find_bin(shared, bins, limit, Quantity::count);
    if (warp_agrees(top_k.members() > kMostMembers)) return kUnsuited;
  }
  WarpBin last = top_k;
  if (nucleus) {
    const int64_t all = params.top_k > 0 ? top_k.front.mass() + top_k.mass_of(limit)
                                         : mass_of_row(logits, n, list.maximum);
    limit = min(mass_limit(all, params.top_p), all);
    last = find_bin(shared, bins, limit, Quantity::mass);
    const bool fit = last.index == top_k.index || last.members() + top_k.members() <= kMostMembers;
    if (params.top_k > 0 && !fit) last = top_k;
  }
  // If these are too few for top-p, then more, as far as there is room.
  const auto is_suited = [&] {
    return warp_agrees(last.index >= 0 && last.members() <= kMostMembers);
  };
  if (!is_suited()) return unsuited_but_with(0.8f * static_cast<float>(capacity));

  bool is_kept = false;
  LaneMember ranked = rank_members(list, params.top_k > 0 ? top_k : last, last);
  if (nucleus && params.top_k > 0) {
    // Of the members, those of `last` have been counted in front of top-k's bin, too.
    const Tally front = last.index == top_k.index ? top_k.front : top_k.front - last.own;
    const int64_t all =
        cut_members(ranked, front, params.top_k, Quantity::count, is_kept).kept.mass();
    limit = min(mass_limit(all, params.top_p), all);
    if (warp_agrees(limit <= last.front.mass() || limit > (last.front + last.own).mass())) {
      last = find_bin(shared, bins, limit, Quantity::mass);
      if (!is_suited()) return unsuited_but_with(0.8f * static_cast<float>(capacity));
      ranked = rank_members(list, last, last);
    }
  }
  const CandidateCut cut = cut_members(ranked, last.front, limit, quantity, is_kept);
  uint32_t kept = ranked.found & __ballot_sync(0xffffffffu, is_kept);
  int64_t mass = ranked.mass_before;
  for (; kept != 0; kept &= kept - 1) {
    mass += shared.members[__ffs(static_cast<int>(kept)) - 1].weight;
  }
  const int64_t target = scaled_draw(row_number(params, row), cut.kept.mass());
  return token_of_candidate(logits, n, pivot, find_drawn(list, cut, mass, target), count);
}

// Blocks of one warp that a multiprocessor shall hold: as many as it takes, but for float those
// that shared memory has room for.
template <class T>
constexpr int warp_blocks() {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870)
  return 16;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
  return 24;
#else
  return sizeof(T) == 4 ? 28 : 32;
#endif
}

// A block is a warp, and has a row.
template <class T>
__global__ void __launch_bounds__(32, warp_blocks<T>())
    guided_sample_warp_kernel(GuidedSampleCudaParams<T> params) {
  auto& shared = *dynamic_shared<WarpRowStorage>();
  const uint32_t row = blockIdx.x;
  const T* const logits = ptx::computed_here(params.logits + int64_t{row} * params.vocabulary);
  ptx::griddepcontrol_launch_dependents();
  TriedPivot tried{0, 0};
  int32_t token = kUnsuited;
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    token = draw_above_pivot(params, row, logits, tried, shared);
    __syncwarp();
    if (!warp_agrees(token == kUnsuited && tried.change != 0)) break;
  }
  if (token == kUnsuited) {
    if (threadIdx.x == 0) params.tokens[row] = kLeftToBlocks;
  } else if (token >= 0) {
    params.tokens[row] = token;
  }
}

}  // namespace flexvar
