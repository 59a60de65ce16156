// The candidates of a resident row. A sample of the row tells a pivot that a few more than top_k
// logits are above, and every warp lists those in its part of the row, in order. A histogram
// of the candidates holds counts and masses at once: one warp finds in it where top-k's limit is
// reached, then top-p's, ranking the tokens of a single bin each time. Every sum is an integer, so
// the order of threads and of atomics does not matter.
#pragma once

#include "guided_sample/resident.cuh"

namespace flexvar {

// A part of the sample that a row's pivot is estimated from: every 32nd piece of it.
template <class T>
struct PivotSample {
  LogitPiece<T> pieces[kPivotSample / 128];
};

// The part of a row's sample that falls to a lane of the warp that calls this.
template <class T>
__device__ inline PivotSample<T> load_pivot_sample(const T* logits, int32_t n) {
  PivotSample<T> sample;
#pragma unroll
  for (int i = 0; i < kPivotSample / 128; ++i) {
    const auto place = (i * 32 + static_cast<int32_t>(threadIdx.x) % 32) * (n / (kPivotSample / 4));
    sample.pieces[i] = load_piece(logits, n, place & ~3);
  }
  return sample;
}

// The pivot, by one warp: about `rank` of the row's sample are above it. NaN is above nothing.
template <class T>
__device__ inline float find_pivot(const PivotSample<T>& sample, int32_t rank) {
  constexpr int kEach = kPivotSample / 32;
  float x[kEach];
  float high = -INFINITY, low = INFINITY;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    x[i] = to_float(sample.pieces[i / 4].values[i % 4]);
    high = fmaxf(high, x[i]);
    low = fminf(low, x[i]);
  }
  high = warp_largest(high);
  low = fmaxf(-warp_largest(-low), high - 2 * kSampleReach);
#pragma unroll 1
  for (int step = 0; step < 20; ++step) {
    const float middle = 0.5f * (low + high);
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) own += ptx::difference_bits(middle, x[i]) >> 31;
    const auto count = static_cast<int32_t>(ptx::warp_sum(own));
    if (count < rank) {
      high = middle;
    } else {
      low = middle;
      if (count <= rank + kPivotSlack) break;
    }
  }
  return low;
}

// What a lane found in its part of the row: a mark for each logit above the pivot, from the highest
// bit on.
struct LaneCandidates {
  uint32_t marks[2];

  __device__ int32_t count() const { return __popc(marks[0]) + __popc(marks[1]); }
  // How many the lanes up to this one have. All lanes of the warp call this.
  __device__ int32_t until() const { return warp_inclusive_sum(count()); }
  // The place in the lane's part of the row of its `which`-th candidate.
  __device__ int32_t place_of(int32_t which) const {
    const int32_t in_first = __popc(marks[0]);
    const bool is_first = which < in_first;
    uint32_t rest = is_first ? marks[0] : marks[1];
    for (int32_t i = is_first ? which : which - in_first; i > 0; --i) rest ^= highest_bit(rest);
    return __clz(static_cast<int>(rest)) + (is_first ? 0 : 32);
  }
  __device__ static uint32_t highest_bit(uint32_t x) {
    return 0x80000000u >> __clz(static_cast<int>(x));
  }
};
static_assert(kSamplePieces * 4 <= 64);

// Marks which logits from `part` on, `pieces` pieces, are above the pivot. kAll: these are as many
// as there can be, and all loads come first.
template <bool kAll, class T>
__device__ inline void mark_above(const T* part, int32_t pieces, float pivot,
                                  uint32_t (&marks)[2]) {
#pragma unroll
  for (int j = 0; j < kSamplePieces; ++j) {
    uint32_t& word = marks[j / 8];
    if (kAll || j < pieces) {
      const auto piece = *reinterpret_cast<const LogitPiece<T>*>(part + j * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        word = __funnelshift_l(ptx::difference_bits(pivot, to_float(piece.values[e])), word, 1);
      }
    } else {
      word <<= 4;
    }
  }
  marks[1] <<= 64 - kSamplePieces * 4;
}

// The candidates of this lane's part of the row, `pieces` pieces from `part` on.
template <class T>
__device__ inline LaneCandidates find_candidates(const T* part, int32_t pieces, float pivot) {
  LaneCandidates mine{{0, 0}};
  if (pieces == kSamplePieces) {
    mark_above<true>(part, pieces, pivot, mine.marks);
  } else {
    mark_above<false>(part, pieces, pivot, mine.marks);
  }
  return mine;
}

// Writes the indices of this lane's candidates to `places`, the part of the row beginning at
// `begin`.
__device__ inline void list_indices(const LaneCandidates& mine, int32_t begin, uint16_t* places) {
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    uint32_t marks = mine.marks[word];
    while (marks != 0) {
      *places++ = static_cast<uint16_t>(begin + word * 32 + __clz(static_cast<int>(marks)));
      marks ^= LaneCandidates::highest_bit(marks);
    }
  }
}

// The bin of a candidate: more of them where logits are denser, close to the pivot. `scale` takes
// the distance from the largest logit to the pivot to the fourth root of the number of bins.
__device__ inline unsigned candidate_bin(float logit, float maximum, float scale) {
  const float distance = (maximum - logit) * scale;
  const float square = distance * distance;
  return min(kSampleBins - 1u, __float2uint_rz(square * square));
}

// The bins' candidates: before this lane's bins, and in them.
struct LaneBins {
  Tally before, own;
};

__device__ inline LaneBins add_up_bins(const SampleStorage& shared) {
  const int lane = threadIdx.x % 32;
  Tally own{0, 0};
#pragma unroll
  for (int b = 0; b < kBinsPerLane; ++b) {
    own = own + shared.bins[lane][b];
  }
  return {warp_inclusive_sum(own) - own, own};
}

// The last candidate kept: its logit and place among the candidates (-1: not found), and the tally
// of all that are kept.
struct CandidateCut {
  float logit;
  int32_t place;
  Tally kept;
};

// The candidates as the warp sees them that finds the cut. A warp's list begins at every
// kPlaces-th place.
template <int kWarps>
struct CandidateLists {
  static constexpr int kPlaces = kCandidatePlaces<kWarps>;
  const CandidateStorage<kWarps>& shared;
  float maximum, scale;

  // use(logit, place, whether there is one), by all lanes together, in order of places.
  template <class Use>
  __device__ void for_each(Use use) const {
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = shared.counts[w];
#pragma unroll 1
      for (int32_t i = static_cast<int32_t>(threadIdx.x) % 32; i / 32 * 32 < count; i += 32) {
        const int32_t place = w * kPlaces + i;
        use(i < count ? shared.candidates[place] : 0, place, i < count);
      }
    }
  }
};

// What a limit is a limit of.
enum class Quantity { count, mass };
__device__ inline int64_t amount(Tally tally, Quantity quantity) {
  return quantity == Quantity::count ? int64_t{tally.count()} : tally.mass();
}

// The cut in a bin of more than 32 candidates, which mostly are a few values many times: value by
// value from the greatest on. Not found where they are too many values.
template <int kWarps>
__device__ inline CandidateCut cut_crowd(const CandidateLists<kWarps>& lists, unsigned bin,
                                         Tally front, int64_t limit, Quantity quantity) {
  constexpr int kMostValues = 16;
  float above = INFINITY;
#pragma unroll 1
  for (int i = 0; i < kMostValues; ++i) {
    float value = -INFINITY;
    lists.for_each([&](float logit, int32_t, bool is_valid) {
      if (is_valid && logit < above && candidate_bin(logit, lists.maximum, lists.scale) == bin) {
        value = fmaxf(value, logit);
      }
    });
    value = warp_largest(value);
    if (value == -INFINITY) break;
    uint32_t own_equal = 0;
    lists.for_each(
        [&](float logit, int32_t, bool is_valid) { own_equal += is_valid && logit == value; });
    const uint32_t equal = ptx::warp_sum(own_equal);
    const Tally each = tally_of(token_weight(value, lists.maximum));
    const Tally until = front + Tally{each.count_and_low * equal, each.high * equal};
    if (amount(until, quantity) < limit) {
      front = until;
      above = value;
      continue;
    }
    const int64_t step = amount(each, quantity);
    const auto kept = static_cast<uint32_t>((limit - amount(front, quantity) + step - 1) / step);
    uint32_t seen = 0;
    int32_t last = -1;
    lists.for_each([&](float logit, int32_t place, bool is_valid) {
      const bool is_equal = is_valid && logit == value;
      const unsigned equals = __ballot_sync(0xffffffffu, is_equal);
      const uint32_t number = seen + __popc(equals & ((2u << place % 32) - 1));
      if (is_equal && number == kept) last = place;
      seen += __popc(equals);
    });
    last = __shfl_sync(0xffffffffu, last, first_lane(last >= 0));
    return {value, last, front + Tally{each.count_and_low * kept, each.high * kept}};
  }
  return {0, -1, front};
}

// Of the candidates in descending order, the first with which the tally up to it reaches `limit`;
// by one warp.
template <int kWarps>
__device__ inline CandidateCut cut_candidates(const LaneBins& bins,
                                              const CandidateLists<kWarps>& lists, int64_t limit,
                                              Quantity quantity) {
  const CandidateStorage<kWarps>& shared = lists.shared;
  const int lane = threadIdx.x % 32;
  const int row = first_lane(amount(bins.before + bins.own, quantity) >= limit);
  const bool used = row >= 0 && lane < kBinsPerLane;
  const Tally own = used ? shared.bins[row][lane] : Tally{0, 0};
  const Tally until = from_lane(bins.before, max(row, 0)) + warp_inclusive_sum(own);
  const int column = first_lane(used && amount(until, quantity) >= limit);
  const auto members = static_cast<int>(from_lane(own, max(column, 0)).count());
  const Tally before = from_lane(until - own, max(column, 0));
  if (column < 0) return {0, -1, before};
  const int32_t bin = row * kBinsPerLane + column;
  if (members > 32) return cut_crowd(lists, static_cast<unsigned>(bin), before, limit, quantity);

  int32_t place = shared.heads[bin], mine = 0;
  for (int member = 0; member < members; ++member) {
    if (member == lane) mine = place;
    place = shared.next[place];
  }
  const float logit = lane < members ? shared.candidates[mine] : -INFINITY;
  const uint32_t weight = token_weight(logit, lists.maximum);
  Tally front = before;
#pragma unroll 4
  for (int member = 0; member < (members + 3) / 4 * 4; ++member) {
    const float other_logit = __shfl_sync(0xffffffffu, logit, member);
    const int32_t other_place = __shfl_sync(0xffffffffu, mine, member);
    const uint32_t other_weight = __shfl_sync(0xffffffffu, weight, member);
    if (other_logit > logit || (other_logit == logit && other_place < mine)) {
      front = front + tally_of(other_weight);
    }
  }
  const Tally kept = front + tally_of(weight);
  const int last = first_lane(lane < members && amount(front, quantity) < limit &&
                              amount(kept, quantity) >= limit);
  return {__shfl_sync(0xffffffffu, logit, last), __shfl_sync(0xffffffffu, mine, last),
          from_lane(kept, last)};
}

// The cut of the candidates and the mass that it keeps, left in `shared`, by one warp. `all`: the
// mass of the whole row, if there is no top-k.
template <int kWarps>
__device__ inline void close_candidates(int32_t top_k, double top_p, int64_t all,
                                        const CandidateLists<kWarps>& lists,
                                        SampleStorage& shared) {
  const LaneBins bins = add_up_bins(shared);
  CandidateCut cut{0, 0, {0, 0}};
  int64_t limit = top_k;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const Quantity quantity = i == 0 ? Quantity::count : Quantity::mass;
    if (quantity == Quantity::mass) {
      if (!(top_p > 0 && top_p < 1)) break;
      if (top_k > 0) all = cut.kept.mass();
      limit = min(mass_limit(all, top_p), all);
    }
    if (limit > 0 && cut.place >= 0) cut = cut_candidates(bins, lists, limit, quantity);
  }
  if (threadIdx.x % 32 == 0) {
    shared.cut_logit = cut.logit;
    shared.cut_end = cut.place;
    shared.kept_mass = cut.kept.mass();
  }
}

// For the next row of candidates, by all threads.
template <int kThreads>
__device__ inline void clear_bins(SampleStorage& shared) {
  struct alignas(16) Words {
    uint32_t words[4];
  };
  constexpr int kWords = sizeof(shared.bins) / sizeof(Words);
  constexpr uint32_t kNone = 0xffffffffu;
  const int thread = ptx::computed_here(threadIdx.x);
  auto* const bins = reinterpret_cast<Words*>(shared.bins);
  auto* const heads = reinterpret_cast<Words*>(shared.heads);
#pragma unroll
  for (int i = 0; i < kWords; i += kThreads) {
    if (i + thread < kWords) bins[i + thread] = Words{{0, 0, 0, 0}};
  }
  if (thread < kSampleBins / 4) heads[thread] = Words{{kNone, kNone, kNone, kNone}};
}

// The result of draw_from_candidates besides a token or -2 (none of this thread).
constexpr int32_t kUnsuited = -3, kUnsuitedAndReplaced = -4;

// The last part of draw_from_candidates: the draw from those up to the cut. The warp has `count`;
// every 32nd of these has its weight here.
template <int kThreads, int kRounds, class T>
__device__ inline int32_t draw_kept(const GuidedSampleCudaParams<T>& params,
                                    const LaneCandidates& mine, const uint32_t (&weights)[kRounds],
                                    int32_t count, float maximum,
                                    CandidateStorage<kThreads / 32>& shared) {
  const int thread = ptx::computed_here(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int32_t list = warp * kRounds * 32;
  const int32_t cut_end = shared.cut_end;
  const float cut = shared.cut_logit;
  const int64_t target = scaled_draw(shared.number, shared.kept_mass);
  const auto is_kept = [&](float logit, int32_t i) {
    return logit > cut || (logit == cut && list + i <= cut_end);
  };
  int64_t own_mass = 0;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int32_t i = r * 32 + lane;
    if (i < count && is_kept(shared.candidates[list + i], i)) own_mass += weights[r];
  }
  const Tally kept = warp_sum(
      Tally{static_cast<uint32_t>(own_mass) & 1023, static_cast<uint32_t>(own_mass >> 10)});
  if (lane == 0) shared.tallies[warp] = kept;
  clear_bins<kThreads>(shared);
  ptx::cp_async_wait();
  __syncthreads();
  if (cut_end < 0) return kUnsuitedAndReplaced;
  int64_t left = target - warp_sum(lane < warp ? shared.tallies[lane] : Tally{0, 0}).mass();
  if (left < 0 || left >= kept.mass()) return -2;  // another warp's

  int32_t found = 0;
#pragma unroll 1
  for (int32_t i = lane;; i += 32) {
    uint32_t weight = 0;
    if (i < count) {
      const float logit = shared.candidates[list + i];
      if (is_kept(logit, i)) weight = token_weight(logit, maximum);
    }
    const Tally until = warp_inclusive_sum(Tally{weight & 1023, weight >> 10});
    const int reached = first_lane(until.mass() > left);
    if (reached >= 0) {
      found = i - lane + reached;
      break;
    }
    left -= from_lane(until, 31).mass();
  }
  const int32_t which = found - (mine.until() - mine.count());
  return which >= 0 && which < mine.count() ? thread * params.pieces * 4 + mine.place_of(which)
                                            : -2;
}

// Draws the token of a resident row, if it can from candidates: returned by one thread, -2 by the
// others. All of them return kUnsuited where it cannot, with the resident row still there.
// Otherwise `begin_next` has run once that was no longer needed, `choose_next_pivot` beside what
// `cutting_warp` does alone, and what begin_next copies is there: the result may still be
// kUnsuitedAndReplaced. Bins are clear before and after.
template <int kThreads, class T, class BeginNext, class ChooseNextPivot>
__device__ inline int32_t draw_from_candidates(const GuidedSampleCudaParams<T>& params,
                                               uint32_t row, const T* resident, int cutting_warp,
                                               BeginNext begin_next,
                                               ChooseNextPivot choose_next_pivot,
                                               CandidateStorage<kThreads / 32>& shared) {
  constexpr int kWarps = kThreads / 32, kPlaces = kCandidatePlaces<kWarps>;
  constexpr int kRounds = kPlaces / 32;
  const int thread = ptx::computed_here(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int32_t pieces = params.pieces, list = warp * kPlaces, begin = thread * pieces * 4;
  const float pivot = shared.pivot;
  const LaneCandidates mine = find_candidates(resident + begin, pieces, pivot);
  const int32_t until = mine.until(), count = __shfl_sync(0xffffffffu, until, 31);
  float maximum = -INFINITY;
  // Beyond the warp's places the row is not drawn from candidates.
  if (count <= kPlaces) list_indices(mine, begin, shared.next + list + until - mine.count());
  __syncwarp();
#pragma unroll 4
  for (int32_t i = lane; i < (count <= kPlaces ? count : 0); i += 32) {
    const float logit = to_float(resident[shared.next[list + i]]);
    shared.candidates[list + i] = logit;
    maximum = fmaxf(maximum, logit);
  }
  maximum = warp_largest(maximum);
  if (lane == 0) {
    shared.largest[warp] = maximum;
    shared.counts[warp] = count;
  }
  __syncthreads();
  const int32_t warps_count = lane < kWarps ? shared.counts[lane] : 0;
  const auto candidates = static_cast<int32_t>(ptx::warp_sum(static_cast<uint32_t>(warps_count)));
#pragma unroll
  for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, shared.largest[w]);
  const float range = maximum - pivot;
  // Infinities, nothing to draw from, all the same; too few candidates, or too many.
  if (!(range > 1e-30f && range < 1e4f) || candidates < max(params.top_k, 1) ||
      candidates > kMaxCandidates || __any_sync(0xffffffffu, warps_count > kPlaces)) {
    return kUnsuited;
  }
  if (params.top_k == 0) {
    const int64_t mass = warp_sum(mass_of_part(resident + begin, pieces, maximum));
    if (lane == 0) shared.sums[warp] = mass;
    __syncthreads();
  }
  begin_next();

  const float scale = __fdividef(4.756828f, range);
  uint32_t weights[kRounds]{};
  int32_t link = 0;  // of the round before, which is stored when it has had time to arrive
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (r * 32 < count) {
      const int32_t place = list + r * 32 + lane;
      const bool is_valid = r * 32 + lane < count;
      const float logit = is_valid ? shared.candidates[place] : maximum;
      const unsigned bin = candidate_bin(logit, maximum, scale);
      const uint32_t weight = token_weight(logit, maximum);
      const Tally tally = tally_of(weight);
      Tally& total = shared.bins[bin / kBinsPerLane][bin % kBinsPerLane];
      if (r > 0) shared.next[place - 32] = static_cast<uint16_t>(link);
      if (is_valid) {
        weights[r] = weight;
        link = atomicExch(&shared.heads[bin], place);
        atomicAdd(&total.count_and_low, tally.count_and_low);
        atomicAdd(&total.high, tally.high);
      }
    }
  }
  const int32_t last = (count - 1) / 32 * 32 + lane;
  if (last < count) shared.next[list + last] = static_cast<uint16_t>(link);
  __syncthreads();
  if (warp == cutting_warp) {
    int64_t all = 0;
    if (params.top_k == 0) {
      for (int w = 0; w < kWarps; ++w) all += shared.sums[w];
    }
    close_candidates(params.top_k, params.top_p, all,
                     CandidateLists<kWarps>{shared, maximum, scale}, shared);
  } else {
    if (warp == (cutting_warp ^ 1) && lane == 0) {
      shared.number = row_number(params, ptx::computed_here(row));
    }
    choose_next_pivot();
  }
  __syncthreads();
  return draw_kept<kThreads>(params, mine, weights, count, maximum, shared);
}

}  // namespace flexvar
