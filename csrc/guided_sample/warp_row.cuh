// A row that one warp samples alone, for many rows: nothing waits for other warps, and what is done
// once for a row costs one warp's instructions. The row streams through registers, and the logits
// above a pivot stay in shared memory, in order. A histogram of these candidates holds counts and
// masses at once; in the bins where limits are reached, tokens are ranked. A row that does not suit
// (infinities, a crowded bin, a sample that misleads twice) is marked for guided_sample_kernel.
#pragma once

#include "guided_sample/candidates.cuh"

namespace flexvar {

constexpr int kStretch = 1024;      // tokens: four times eight for each lane
constexpr int kMostStretches = 32;  // of a row: a lane knows where one begins
constexpr int kWarpBins = 224, kWarpBinsPerLane = kWarpBins / 32;
constexpr int kMostMembers = 32;  // of bins that are ranked: one for each lane

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

// Logits are handled in words, of one float or two 16-bit floats.
template <class T>
constexpr int kLogitsPerWord = 4 / sizeof(T);

template <class T>
__device__ inline float logit_of_word(uint32_t word, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word);
  } else {
    const auto bits = static_cast<uint16_t>(word >> 16 * i);
    if constexpr (std::is_same_v<T, __half>) {
      return to_float(__ushort_as_half(bits));
    } else {
      return to_float(__ushort_as_bfloat16(bits));
    }
  }
}
template <class T>
constexpr uint32_t kInfinityWord = std::is_same_v<T, __half>          ? 0x7c007c00
                                   : std::is_same_v<T, __nv_bfloat16> ? 0x7f807f80
                                                                      : 0x7f800000;
// A word of nothing but the greatest T that is not above x.
template <class T>
__device__ inline uint32_t word_of(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(__float2half_rd(x)) * 0x10001u;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat16_as_ushort(__float2bfloat16_rd(x)) * 0x10001u;
  } else {
    return __float_as_uint(x);
  }
}

// A condition that all lanes find the same, in a way that tells the compiler so: it then does not
// expect lanes to part.
__device__ inline bool warp_agrees(bool condition) { return __any_sync(0xffffffffu, condition); }

// Eight logits of a row: rows begin at multiples of 16 bytes, and have a multiple of eight.
template <class T>
struct alignas(16) LogitOctet {
  uint32_t words[8 / kLogitsPerWord<T>];

  __device__ float logit(int i) const {
    return logit_of_word<T>(words[i / kLogitsPerWord<T>], i % kLogitsPerWord<T>);
  }
};

// A lane's logits of a stretch of a row: every 256th eight.
template <class T>
struct LaneStretch {
  static constexpr int kOctets = 4;
  LogitOctet<T> octets[kOctets];
  int32_t begin, end;  // of the first octet, of the row

  __device__ LaneStretch(const T* logits, int32_t n, int32_t stretch)
      : begin((stretch - 1) * kStretch + static_cast<int32_t>(threadIdx.x) % 32 * 8), end(n) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) load_next(logits, i);
    begin += kStretch;
  }
  __device__ bool has(int i) const { return begin + i * 256 < end; }
  // That octet of the next stretch, or where there is none another one: without a branch. With the
  // last octet, `begin` is to be moved there.
  __device__ void load_next(const T* logits, int i) {
    const int32_t next = min(begin + kStretch + i * 256, end - 8);
    octets[i] = *reinterpret_cast<const LogitOctet<T>*>(logits + next);
  }
  // What an octet's candidates are above, if its candidates are above `pivot`, which is not -0.
  __device__ uint32_t floor_of(int i, uint32_t pivot) const {
    return has(i) ? pivot : kInfinityWord<T>;
  }
  // How many logits of the octets are above the pivot: the first octet's in the lowest byte. NaN is
  // not.
  __device__ uint32_t count_above(uint32_t pivot) const {
    uint32_t counts = 0;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = kOctets - 1; i >= 0; --i) {
        const float floor = __uint_as_float(floor_of(i, pivot));
        counts <<= 8;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          counts += ptx::difference_bits(floor, octets[i].logit(e)) >> 31;
        }
      }
    } else {
      // A bit for each: four for an octet's first logits of words, and 16 bits higher four for its
      // second ones.
      uint32_t marks = 0;
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        const uint32_t floor = floor_of(i, pivot);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          marks |= ptx::above_mask<T>(octets[i].words[w], floor) & 0x10001u << (4 * i + w);
        }
      }
      marks -= marks >> 1 & 0x55555555u;
      marks = (marks & 0x33333333u) + (marks >> 2 & 0x33333333u);
      counts = (marks & 0xffffu) + (marks >> 16);  // 4 bits for each octet
      counts = (counts | counts << 8) & 0x00ff00ffu;
      counts = (counts | counts << 4) & 0x0f0f0f0fu;
    }
    return counts;
  }
};

// The numbers of a stretch's candidates, in order. All lanes make it of their counts.
class StretchNumbers {
 public:
  __device__ explicit StretchNumbers(uint32_t counts)
      // A byte holds up to 248 before the last lane. What is carried out of a byte in the last
      // one's sum, if all logits are candidates, is taken back.
      : before_(ptx::warp_inclusive_sum(counts) - counts) {
    const uint32_t evens = ptx::warp_sum(counts & 0x00ff00ffu);
    const uint32_t odds = ptx::warp_sum(counts >> 8 & 0x00ff00ffu);
    begins_[0] = 0;
    begins_[1] = evens & 0xffff;
    begins_[2] = begins_[1] + (odds & 0xffff);
    begins_[3] = begins_[2] + (evens >> 16);
    all_ = begins_[3] + (odds >> 16);
  }
  // Of the first in this lane's octet i.
  __device__ uint32_t first(int i) const { return begins_[i] + (before_ >> 8 * i & 0xff); }
  __device__ uint32_t all() const { return all_; }

 private:
  uint32_t before_, begins_[4], all_;
};

// What list_candidates found.
struct CandidateCount {
  int32_t all;
  int32_t before;  // this lane's stretch
};

// Two candidates that lie side by side. An odd number of these falls to each lane, so that lanes
// find theirs in different banks.
template <class T>
struct alignas(2 * sizeof(T)) CandidatePair {
  uint32_t words[2 / kLogitsPerWord<T>];

  __device__ float logit(int i) const {
    return logit_of_word<T>(words[i / kLogitsPerWord<T>], i % kLogitsPerWord<T>);
  }
};
__device__ inline int32_t candidate_pairs_per_lane(int32_t candidates) {
  return (candidates + 63) / 64 | 1;
}

// Lists the logits above the pivot; with more than `capacity` the list is of no use. Otherwise -inf
// fills the last lanes' pairs.
template <class T>
__device__ inline CandidateCount list_candidates(const T* logits, int32_t n, uint32_t pivot,
                                                 int32_t capacity, WarpRowStorage& shared) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  CandidateCount count{0, 0};
  ptx::ListEnd<T> list(shared.candidates<T>());
  LaneStretch<T> mine(logits, n, 0);
#pragma unroll 1
  for (int32_t stretch = 0; stretch * kStretch < n; ++stretch) {
    ptx::prefetch(logits + min((stretch + 2) * kStretch + lane * (kStretch / 32), n - 1));
    if (lane == stretch) count.before = count.all;
    const StretchNumbers numbers(mine.count_above(pivot));
    count.all += static_cast<int32_t>(numbers.all());
    if (count.all <= capacity) {
#pragma unroll
      for (int i = 0; i < mine.kOctets; ++i) {
        const uint32_t floor = mine.floor_of(i, pivot);
        ptx::ListEnd<T> end = list.behind(numbers.first(i));
#pragma unroll
        for (uint32_t word : mine.octets[i].words) end.append_above(floor, word);
      }
    }
#pragma unroll
    for (int i = 0; i < mine.kOctets; ++i) mine.load_next(logits, i);
    mine.begin += kStretch;
    list = list.behind(numbers.all());
  }
  if (count.all <= capacity) {
    const int32_t end = candidate_pairs_per_lane(count.all) * 64;
#pragma unroll 1
    for (int32_t i = count.all + lane; i < end; i += 32) {
      shared.candidates<T>()[i] = from_float<T>(-INFINITY);
    }
  }
  __syncwarp();
  return count;
}

// The mass of a row whose largest logit is `maximum`.
template <class T>
__device__ inline int64_t mass_of_row(const T* logits, int32_t n, float maximum) {
  int64_t mass = 0;
  LaneStretch<T> mine(logits, n, 0);
#pragma unroll 1
  for (int32_t stretch = 0; stretch * kStretch < n; ++stretch) {
#pragma unroll
    for (int i = 0; i < mine.kOctets; ++i) {
      if (mine.has(i)) {
        uint32_t weights[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) weights[e] = token_weight(mine.octets[i].logit(e), maximum);
        mass += weights[0] + weights[1] + weights[2];  // at most 3 * 2^30
        mass += weights[3] + weights[4] + weights[5];
        mass += weights[6] + weights[7];
      }
      mine.load_next(logits, i);
    }
    mine.begin += kStretch;
  }
  return warp_sum(mass);
}

template <class T>
struct WarpCandidates {
  WarpRowStorage& shared;
  int32_t pairs;  // of each lane
  float maximum, scale;

  // A candidate's bin is the whole part of this: there are more bins where logits are denser, close
  // to the pivot. `scale` takes the distance from the largest logit to the pivot to a little less
  // than the fourth root of the number of bins.
  __device__ float position(float logit) const {
    const float distance = (logit - maximum) * scale;
    const float square = distance * distance;
    return square * square;
  }

  __device__ const CandidatePair<T>& pair(int32_t i) const {
    return reinterpret_cast<const CandidatePair<T>*>(shared.candidates<T>())[i];
  }
  // use(pair, place of its first) for this lane's pairs, in order. Behind the last candidate there
  // is -inf, which has a position behind all bins.
  template <class Use>
  __device__ void for_each_pair(Use use) const {
    const int32_t begin = static_cast<int32_t>(threadIdx.x) % 32 * pairs;
#pragma unroll 2
    for (int32_t i = 0; i < pairs; ++i) use(pair(begin + i), (begin + i) * 2);
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
      const unsigned bin = __float2uint_rz(fminf(list.position(pair.logit(e)), kWarpBins));
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
  const auto first_begin = static_cast<float>(first.index);
  const auto second_begin = static_cast<float>(second.index);
  LaneMember mine{-INFINITY, -1, 0, {0, 0}, 0, 0};
  int members = 0;
  __syncwarp();  // the ranking before may still read its members
  list.for_each_pair([&](CandidatePair<T> pair, int32_t place) {
    uint32_t weights[2], before = 0;
    bool is_member[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float position = list.position(pair.logit(e));
      weights[e] = token_weight(pair.logit(e), list.maximum);
      before += position < second_begin ? weights[e] : 0;
      const bool is_first = (position >= first_begin) & (position < first_begin + 1);
      const bool is_second = (position >= second_begin) & (position < second_begin + 1);
      is_member[e] = is_first | is_second;
    }
    mine.mass_before += before;  // at most 2 * 2^30
    if (!__any_sync(0xffffffffu, is_member[0] | is_member[1])) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const unsigned these = __ballot_sync(0xffffffffu, is_member[e]);
      if (these == 0) continue;
      if (is_member[e]) {
        const int member = members + __popc(these & ((1u << lane) - 1));
        shared.members[member] = {pair.logit(e), weights[e]};
        shared.places[member] = static_cast<uint16_t>(place + e);
        mine.found |= 1u << member;
      }
      members += __popc(these);
    }
  });
  __syncwarp();

  if (lane < members) {
    mine.logit = shared.members[lane].logit;
    mine.weight = shared.members[lane].weight;
    mine.place = shared.places[lane];
  }
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
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  const bool is_before = lane * kStretch < n && count.before <= place;
  const int stretch = __popc(__ballot_sync(0xffffffffu, is_before)) - 1;
  const LaneStretch<T> mine(logits, n, stretch);
  const uint32_t counts = mine.count_above(pivot);
  const StretchNumbers numbers(counts);
  // In which octet, and as which of its candidates.
  const auto number =
      static_cast<uint32_t>(place - __shfl_sync(0xffffffffu, count.before, stretch));
  int32_t octet = -1;
  uint32_t which = 0;
#pragma unroll
  for (int i = 0; i < mine.kOctets; ++i) {
    const uint32_t behind_first = number - numbers.first(i);
    if (behind_first < (counts >> 8 * i & 0xff)) {
      octet = mine.begin + i * 256;
      which = behind_first;
    }
  }
  const int owner = first_lane(octet >= 0);
  const int32_t token = __shfl_sync(0xffffffffu, octet, owner) + lane;
  which = __shfl_sync(0xffffffffu, which, owner);
  const bool is_candidate =
      lane < 8 && to_float(logits[lane < 8 ? token : 0]) > logit_of_word<T>(pivot, 0);
  const unsigned candidates = __ballot_sync(0xffffffffu, is_candidate);
  const auto own = static_cast<uint32_t>(__popc(candidates & ((1u << lane) - 1)));
  return is_candidate && own == which ? token : -2;
}

// Draws a row's token from the logits above a pivot, if it can: returned by one lane, -2 by the
// others; kUnsuited by all of them where it cannot, with a `rank` of another pivot to try.
template <class T>
__device__ inline int32_t draw_above_pivot(const GuidedSampleCudaParams<T>& params, uint32_t row,
                                           const T* logits, int32_t& rank, WarpRowStorage& shared) {
  const int32_t n = params.vocabulary, capacity = params.capacity;
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  ptx::prefetch(logits + lane * (kStretch / 32));
  ptx::prefetch(logits + min(kStretch + lane * (kStretch / 32), n - 1));
  const uint32_t pivot =
      word_of<T>(find_pivot(load_pivot_sample<true>(logits, n), rank) + 0.0f);  // not -0
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

  WarpCandidates<T> list{shared, candidate_pairs_per_lane(count.all), -INFINITY, 0};
  float maximum = -INFINITY;
  list.for_each_pair([&](CandidatePair<T> pair, int32_t) {
    maximum = fmaxf(maximum, fmaxf(pair.logit(0), pair.logit(1)));
  });
  list.maximum = warp_largest(maximum);
  const float range = list.maximum - logit_of_word<T>(pivot, 0);
  if (!warp_agrees(range > 1e-30f && range < 1e4f)) return kUnsuited;  // infinities, all the same
  list.scale = __fdividef(3.8685f, range);

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
  if (!is_suited()) return choose_rank_for(0.8f * static_cast<float>(capacity));

  bool is_kept = false;
  LaneMember mine = rank_members(list, params.top_k > 0 ? top_k : last, last);
  if (nucleus && params.top_k > 0) {
    // Of the members, those of `last` have been counted in front of top-k's bin, too.
    const Tally front = last.index == top_k.index ? top_k.front : top_k.front - last.own;
    const int64_t all =
        cut_members(mine, front, params.top_k, Quantity::count, is_kept).kept.mass();
    limit = min(mass_limit(all, params.top_p), all);
    if (warp_agrees(limit <= last.front.mass() || limit > (last.front + last.own).mass())) {
      last = find_bin(shared, bins, limit, Quantity::mass);
      if (!is_suited()) return choose_rank_for(0.8f * static_cast<float>(capacity));
      mine = rank_members(list, last, last);
    }
  }
  const CandidateCut cut = cut_members(mine, last.front, limit, quantity, is_kept);
  uint32_t kept = mine.found & __ballot_sync(0xffffffffu, is_kept);
  int64_t mass = mine.mass_before;
  for (; kept != 0; kept &= kept - 1) {
    mass += shared.members[__ffs(static_cast<int>(kept)) - 1].weight;
  }
  const int64_t target = scaled_draw(row_number(params, row), cut.kept.mass());
  return token_of_candidate(logits, n, pivot, find_drawn(list, cut, mass, target), count);
}

// A block is a warp, and has a row.
template <class T>
__global__ void __launch_bounds__(32) guided_sample_warp_kernel(GuidedSampleCudaParams<T> params) {
  auto& shared = *dynamic_shared<WarpRowStorage>();
  const uint32_t row = blockIdx.x;
  const T* const logits = ptx::computed_here(params.logits + int64_t{row} * params.vocabulary);
  int32_t rank = params.pivot_rank, token = kUnsuited;
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    token = draw_above_pivot(params, row, logits, rank, shared);
    __syncwarp();
    if (!warp_agrees(token == kUnsuited)) break;
  }
  if (token == kUnsuited) {
    if (threadIdx.x == 0) params.tokens[row] = kLeftToBlocks;
  } else if (token >= 0) {
    params.tokens[row] = token;
  }
}

}  // namespace flexvar
