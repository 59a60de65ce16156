// A row that one warp samples alone, for many rows: nothing waits for other warps, and what is done
// once for a row costs one warp's instructions. The row streams through registers, and the logits
// above a pivot stay in shared memory, in order; what comes first tells the pivot. A histogram of
// these candidates holds counts and masses at once; in the bins where limits are reached, tokens
// are ranked. A row that does not suit (infinities, a crowded bin, two samples that mislead) is
// marked for guided_sample_kernel.
#pragma once

#include "guided_sample/candidates.cuh"

namespace flexvar {

constexpr int kStretch = 1024;                // tokens: 32 for each lane; and a row's sample
static_assert(kStretch <= 2 * kPivotSample);  // the shortest row with a pivot
constexpr int kMostStretches = 32;            // of a row: a lane knows where one begins
constexpr int kWarpBins = 224, kWarpBinsPerLane = kWarpBins / 32;
constexpr float kWarpBinsRoot = 3.866f;  // less than the fourth root of kWarpBins - 0.5
constexpr int kStretchesAhead = 2;       // that are on their way to the L2 cache
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

// 16 bytes of a row, which begins at a multiple of as many.
template <class T>
struct alignas(16) LogitUnit {
  static constexpr int kLogits = 4 * kLogitsPerWord<T>;
  uint32_t words[4];

  __device__ float logit(int i) const {
    return logit_of_word<T>(words[i / kLogitsPerWord<T>], i % kLogitsPerWord<T>);
  }
};

// A number for each of a lane's units of a stretch, each in a byte.
template <class T>
struct UnitCounts {
  static constexpr int kWords = kStretch / 32 / LogitUnit<T>::kLogits / 4;
  uint32_t words[kWords];

  __device__ uint32_t of(int unit) const { return words[unit / 4] >> unit % 4 * 8 & 0xff; }
  __device__ uint32_t sum() const {  // up to 255
    uint32_t sum = 0;
#pragma unroll
    for (uint32_t word : words) sum += word;
    return sum * 0x01010101u >> 24;
  }
};

// A lane's logits of a stretch: every 32nd unit. The row's last stretch ends where the row does,
// and begins within the one before.
template <class T>
struct LaneStretch {
  static constexpr int kLogits = LogitUnit<T>::kLogits, kStep = 32 * kLogits;
  static constexpr int kUnits = kStretch / kStep;
  LogitUnit<T> units[kUnits];

  __device__ static int32_t begin(int32_t n, int32_t stretch) {
    return min(stretch * kStretch, n - kStretch) + static_cast<int32_t>(threadIdx.x) % 32 * kLogits;
  }
  __device__ void load(const T* logits, int32_t n, int32_t stretch) {
    const T* const mine = logits + begin(n, stretch);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      units[i] = *reinterpret_cast<const LogitUnit<T>*>(mine + i * kStep);
    }
  }
  // Instead of a stretch a sample of the whole row: the lanes' units one behind the other, at equal
  // distances.
  __device__ void load_sample(const T* logits, int32_t n) {
    const int32_t lane = ptx::computed_here(threadIdx.x) % 32;
    const int32_t distance = n / (kStretch / kLogits);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int32_t place = (lane * kUnits + i) * distance / kLogits * kLogits;
      units[i] = *reinterpret_cast<const LogitUnit<T>*>(logits + place);
    }
  }
  // Forgets what belongs to the stretch before.
  __device__ void keep_from(int32_t n, int32_t stretch) {
    if (n >= (stretch + 1) * kStretch) return;
    const int32_t own = begin(n, stretch);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (own + i * kStep < stretch * kStretch) {
#pragma unroll
        for (uint32_t& word : units[i].words) word = word_of<T>(-INFINITY);
      }
    }
  }
  __device__ float logit(int i) const { return units[i / kLogits].logit(i % kLogits); }

  // How many logits of each unit are above the pivot, which is not -0. NaN is not.
  __device__ UnitCounts<T> count_above(uint32_t pivot) const {
    UnitCounts<T> counts{};
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = kUnits - 1; i >= 0; --i) {
        uint32_t& count = counts.words[i / 4];
        count <<= 8;
#pragma unroll
        for (int e = 0; e < kLogits; ++e) {
          count += ptx::difference_bits(__uint_as_float(pivot), units[i].logit(e)) >> 31;
        }
      }
    } else {
      // A bit for each: four for a unit's first logits of words, and 16 bits higher four for its
      // second ones.
      uint32_t marks = 0;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          marks |= ptx::above_mask<T>(units[i].words[w], pivot) & 0x10001u << (4 * i + w);
        }
      }
      marks -= marks >> 1 & 0x55555555u;
      marks = (marks & 0x33333333u) + (marks >> 2 & 0x33333333u);
      uint32_t four_bits = (marks & 0xffffu) + (marks >> 16);  // for each unit
      four_bits = (four_bits | four_bits << 8) & 0x00ff00ffu;
      counts.words[0] = (four_bits | four_bits << 4) & 0x0f0f0f0fu;
    }
    return counts;
  }
};

// use(stretch) for each stretch of a row, which is in `mine` then; the first one is there before.
template <class T, class Use>
__device__ inline void for_each_stretch(const T* logits, int32_t n, LaneStretch<T>& mine, Use use) {
#pragma unroll 1
  for (int32_t stretch = 0; stretch * kStretch < n; ++stretch) {
    const auto line = static_cast<int32_t>(threadIdx.x) % 32 * (kStretch / 32);
    ptx::prefetch(logits + min((stretch + kStretchesAhead) * kStretch + line, n - 1));
    mine.keep_from(n, stretch);
    use(stretch);
    if ((stretch + 1) * kStretch < n) mine.load(logits, n, stretch + 1);
  }
}

// How many candidates there are in each 32 units that lie side by side in a stretch.
template <class T>
struct StretchSums {
  static constexpr int kUnits = LaneStretch<T>::kUnits;
  uint32_t
      words[2];  // float: a byte for each; otherwise 16 bits, the first and third of four first

  __device__ explicit StretchSums(const UnitCounts<T>& counts) {
    if constexpr (kUnits == 8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) words[i] = ptx::warp_sum(counts.words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) words[i] = ptx::warp_sum(counts.words[0] >> 8 * i & 0x00ff00ffu);
    }
  }
  __device__ StretchSums(uint32_t first, uint32_t second) : words{first, second} {}
  // Where in the stretch's candidates those of each 32 units begin, and in the last place all.
  __device__ void find_begins(uint32_t (&begins)[kUnits + 1]) const {
    begins[0] = 0;
#pragma unroll
    for (int i = 0; i < kUnits; i += 4) {
      const uint32_t evens = kUnits == 8 ? words[i / 4] & 0x00ff00ffu : words[0];
      const uint32_t odds = kUnits == 8 ? words[i / 4] >> 8 & 0x00ff00ffu : words[1];
      begins[i + 1] = begins[i] + (evens & 0xffff);
      begins[i + 2] = begins[i + 1] + (odds & 0xffff);
      begins[i + 3] = begins[i + 2] + (evens >> 16);
      begins[i + 4] = begins[i + 3] + (odds >> 16);
    }
  }
};

// What list_candidates found.
struct CandidateCount {
  int32_t all;
  int32_t before;    // this lane's stretch
  uint32_t sums[2];  // StretchSums of this lane's stretch
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

// Appends a stretch's logits above the pivot to the list that ends there.
template <class T>
__device__ inline void append_candidates(const LaneStretch<T>& mine, uint32_t pivot,
                                         const UnitCounts<T>& counts,
                                         const uint32_t (&begins)[LaneStretch<T>::kUnits + 1],
                                         const ptx::ListEnd<T>& list) {
  // Those of the lanes in front. With all 32 lanes' a byte may overflow, which is taken back.
  UnitCounts<T> before;
#pragma unroll
  for (int i = 0; i < before.kWords; ++i) {
    before.words[i] = ptx::warp_inclusive_sum(counts.words[i]) - counts.words[i];
  }
  constexpr int kTogether = ptx::ListEnd<T>::kTogether;
#pragma unroll
  for (int first = 0; first < mine.kUnits; first += kTogether) {
    ptx::ListEnd<T> ends[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      ends[i] = list.behind(begins[first + i] + before.of(first + i));
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t words[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) words[i] = mine.units[first + i].words[w];
      ptx::ListEnd<T>::append_above(ends, pivot, words);
    }
  }
}

// Lists the logits above the pivot; with more than `capacity` the list is of no use. Otherwise -inf
// fills the last lanes' pairs. The row's first stretch is in `mine`.
template <class T>
__device__ inline CandidateCount list_candidates(const T* logits, int32_t n, uint32_t pivot,
                                                 int32_t capacity, LaneStretch<T>& mine,
                                                 WarpRowStorage& shared) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  CandidateCount count{};
  ptx::ListEnd<T> list(shared.candidates<T>());
  for_each_stretch(logits, n, mine, [&](int32_t stretch) {
    const UnitCounts<T> counts = mine.count_above(pivot);
    const StretchSums<T> sums(counts);
    uint32_t begins[mine.kUnits + 1];
    sums.find_begins(begins);
    if (lane == stretch) {
      count.before = count.all;
#pragma unroll
      for (int i = 0; i < 2; ++i) count.sums[i] = sums.words[i];
    }
    count.all += static_cast<int32_t>(begins[mine.kUnits]);
    if (count.all <= capacity) append_candidates(mine, pivot, counts, begins, list);
    list = list.behind(begins[mine.kUnits]);
  });
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

// The pivot: about `rank` logits of the sample are above it. NaN is above nothing.
template <class T>
__device__ inline uint32_t find_pivot(const LaneStretch<T>& sample, int32_t rank) {
  constexpr int kByCounts = 8;  // steps
  // A quarter of the sample tells where to search.
  float high = -INFINITY, low = INFINITY;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    high = fmaxf(high, sample.logit(i));
    low = fminf(low, sample.logit(i));
  }
  high = warp_largest(high);
  low = fmaxf(-warp_largest(-low), high - 2 * kSampleReach);
  uint32_t pivot = word_of<T>(low + 0.0f);  // not -0
  float above_low = kStretch, above_high = 0;
  const float wanted = static_cast<float>(rank) + kPivotSlack / 2.0f;
#pragma unroll 1
  for (int step = 0; step < 24; ++step) {
    // As if logits lay evenly between the two, which soon holds about; the first step is a guess.
    float share = __fdividef(above_low - wanted, above_low - above_high);
    share = step == 0 ? 0.7f : step < kByCounts ? fminf(fmaxf(share, 0.125f), 0.875f) : 0.5f;
    const float place = low + (high - low) * share;
    const uint32_t middle = word_of<T>(place + 0.0f);
    const auto count = static_cast<int32_t>(ptx::warp_sum(sample.count_above(middle).sum()));
    if (count < rank) {
      high = logit_of_word<T>(middle, 0);
      above_high = static_cast<float>(count);
    } else {
      const bool is_neighbour = warp_agrees(middle == pivot && step >= kByCounts);
      pivot = middle;
      low = logit_of_word<T>(middle, 0);
      above_low = static_cast<float>(count);
      if (count <= rank + kPivotSlack || is_neighbour) break;
    }
  }
  return pivot;
}

// The mass of a row whose largest logit is `maximum`.
template <class T>
__device__ inline int64_t mass_of_row(const T* logits, int32_t n, float maximum) {
  int64_t mass = 0;
  LaneStretch<T> mine;
  mine.load(logits, n, 0);
  for_each_stretch(logits, n, mine, [&](int32_t) {
#pragma unroll
    for (int i = 0; i < kStretch / 32; i += 2) {  // the two weigh at most 2 * 2^30
      mass += token_weight(mine.logit(i), maximum) + token_weight(mine.logit(i + 1), maximum);
    }
  });
  return warp_sum(mass);
}

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
  const CandidateCount count = list_candidates(logits, n, pivot, capacity, mine, shared);
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
