// A row as one warp reads it, a stretch of tokens at a time: the pivot that its first tokens tell,
// the list of its logits above a pivot, in order, and its mass.
#pragma once

#include "guided_sample/candidates.cuh"

namespace flexvar {

constexpr int kStretch = 1024;                // tokens: 32 for each lane; and a row's sample
static_assert(kStretch <= 2 * kPivotSample);  // the shortest row with a pivot
constexpr int kMostStretches = 32;            // of a row: a lane knows where one begins
constexpr int kStretchesAhead = 2;            // that are on their way to the L2 cache

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

// Lists the logits above the pivot, in shared memory; with more than `capacity` the list is of no
// use. Otherwise -inf fills the last lanes' pairs. The row's first stretch is in `mine`.
template <class T>
__device__ inline CandidateCount list_candidates(const T* logits, int32_t n, uint32_t pivot,
                                                 int32_t capacity, LaneStretch<T>& mine,
                                                 T* candidates) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % 32;
  CandidateCount count{};
  ptx::ListEnd<T> list(candidates);
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
      candidates[i] = from_float<T>(-INFINITY);
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

}  // namespace flexvar
