// A row that a block holds in registers. A sample of it tells a pivot that a few more than top_k
// logits reach, and what reaches it, the candidates, is copied out in order. A histogram of the
// candidates holds counts and masses at once: one warp finds in it where top-k's limit is reached,
// then top-p's, ranking the tokens of a single bin each time. Every sum is an integer, so the order
// of threads and of atomics does not matter.
#pragma once

#include "guided_sample/row.cuh"

namespace flexvar {

template <class T>
struct alignas(4 * sizeof(T)) LogitPiece {
  T values[4];
};
// Its bits: 16-bit elements, two in a register until they are needed.
template <class T>
struct alignas(4 * sizeof(T)) PieceBits {
  uint32_t words[sizeof(T)];
};

template <class T>
__device__ inline bool in_whole_pieces(const T* logits) {
  return reinterpret_cast<uintptr_t>(logits) % sizeof(LogitPiece<T>) == 0;
}

// Four logits of a row of n from `begin` on, -inf where there are none.
template <class T>
__device__ inline LogitPiece<T> load_piece(const T* logits, int32_t n, int32_t begin) {
  if (in_whole_pieces(logits) && begin + 4 <= n) {
    return *reinterpret_cast<const LogitPiece<T>*>(logits + begin);
  }
  LogitPiece<T> piece;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    piece.values[e] = begin + e < n ? logits[begin + e] : from_float<T>(-INFINITY);
  }
  return piece;
}

// The pivot, by one warp: about `rank` of the row's sample reach it, of which this lane has every
// 32nd piece. NaN reaches nothing.
__device__ inline float find_pivot(const LogitPiece<float>* sample, int32_t rank) {
  float high = -INFINITY, low = INFINITY;
#pragma unroll
  for (int i = 0; i < kPivotSample / 128; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      high = fmaxf(high, sample[i * 32].values[e]);
      low = fminf(low, sample[i * 32].values[e]);
    }
  }
  high = warp_largest(high);
  low = fmaxf(-warp_largest(-low), high - 2 * kSampleReach);
#pragma unroll 1
  for (int step = 0; step < 20; ++step) {
    const float middle = 0.5f * (low + high);
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kPivotSample / 128; ++i) {
      const LogitPiece<float> piece = sample[i * 32];
#pragma unroll
      for (int e = 0; e < 4; ++e) own += piece.values[e] >= middle;
    }
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

// The bins' candidates: before this lane's bins, and in them.
struct LaneBins {
  Tally before, own;
};

__device__ inline LaneBins add_up_bins(const SampleStorage& shared) {
  const int lane = threadIdx.x % 32;
  Tally own{0, 0};
#pragma unroll
  for (int b = 0; b < kBinsPerLane; ++b) {
    own = own + Tally{shared.bins_count_and_low[lane][b], shared.bins_high[lane][b]};
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

// Of the candidates in descending order, the first with which value_of(the tally up to it) reaches
// `limit`; by one warp. Not found where the bin holds more than 32.
template <class ValueOf>
__device__ inline CandidateCut cut_candidates(const LaneBins& bins, float maximum, int64_t limit,
                                              ValueOf value_of, const SampleStorage& shared) {
  const int lane = threadIdx.x % 32;
  const int row = first_lane(value_of(bins.before + bins.own) >= limit);
  const bool used = row >= 0 && lane < kBinsPerLane;
  const Tally own =
      used ? Tally{shared.bins_count_and_low[row][lane], shared.bins_high[row][lane]} : Tally{0, 0};
  const Tally until = from_lane(bins.before, max(row, 0)) + warp_inclusive_sum(own);
  const int column = first_lane(used && value_of(until) >= limit);
  const auto members = static_cast<int>(from_lane(own, max(column, 0)).count());
  const Tally before = from_lane(until - own, max(column, 0));
  if (column < 0 || members > 32) return {0, -1, before};

  int32_t place = shared.heads[row * kBinsPerLane + column], mine = 0;
  for (int member = 0; member < members; ++member) {
    if (member == lane) mine = place;
    place = shared.next[place];
  }
  const float logit = lane < members ? shared.candidates[mine] : maximum;
  const uint32_t weight = token_weight(logit, maximum);
  Tally front = before;
#pragma unroll 1
  for (int member = 0; member < members; ++member) {
    const float other_logit = __shfl_sync(0xffffffffu, logit, member);
    const int32_t other_place = __shfl_sync(0xffffffffu, mine, member);
    const uint32_t other_weight = __shfl_sync(0xffffffffu, weight, member);
    if (other_logit > logit || (other_logit == logit && other_place < mine)) {
      front = front + tally_of(other_weight);
    }
  }
  const Tally kept = front + tally_of(weight);
  const int last = first_lane(lane < members && value_of(front) < limit && value_of(kept) >= limit);
  return {__shfl_sync(0xffffffffu, logit, last), __shfl_sync(0xffffffffu, mine, last),
          from_lane(kept, last)};
}

// The cut of the candidates and the draw's target, left in `shared`, by one warp. `all`: the mass
// of the whole row, if there is no top-k.
__device__ inline void close_candidates(int32_t top_k, double top_p, int64_t all, float maximum,
                                        SampleStorage& shared) {
  const LaneBins bins = add_up_bins(shared);
  CandidateCut cut{0, 0, {0, 0}};
  if (top_k > 0) {
    cut = cut_candidates(
        bins, maximum, top_k, [](Tally tally) { return int64_t{tally.count()}; }, shared);
    all = cut.kept.mass();
  }
  if (cut.place >= 0 && top_p > 0 && top_p < 1) {
    cut = cut_candidates(
        bins, maximum, min(mass_limit(all, top_p), all), [](Tally tally) { return tally.mass(); },
        shared);
  }
  if (threadIdx.x % 32 == 0) {
    shared.cut_logit = cut.logit;
    shared.cut_end = cut.place;
    shared.target = scaled_draw(shared.number, cut.kept.mass());
  }
}

// The bin of a candidate: more of them where logits are denser, close to the pivot. `scale` takes
// the distance from the largest logit to the pivot to the fourth root of the number of bins.
__device__ inline unsigned candidate_bin(float logit, float maximum, float scale) {
  const float distance = (maximum - logit) * scale;
  const float square = distance * distance;
  return min(kSampleBins - 1u, __float2uint_rz(square * square));
}

__device__ inline int32_t byte_of(uint32_t x, int which) {
  return static_cast<int32_t>(__byte_perm(x, 0, 0x4440 + which));
}

// Adds up the four bytes of x, of at most 128 each.
__device__ inline uint32_t sum_of_bytes(uint32_t x) {
  const uint32_t pairs = (x & 0x00ff00ffu) + (x >> 8 & 0x00ff00ffu);
  return (pairs & 0xffff) + (pairs >> 16);
}

// Draws the row's token, if it can from candidates: left with one thread; the others' stays as it
// is. Leaves the largest logit, too.
template <int kThreads, class T>
__device__ inline bool draw_from_candidates(const GuidedSampleCudaParams<T>& params, uint32_t row,
                                            float& maximum, int32_t& token, SampleStorage& shared) {
  constexpr int kWarps = kThreads / 32, kWords = (kSamplePieces + 3) / 4;
  const int32_t n = params.vocabulary;
  const T* const logits = params.logits + int64_t{row} * n;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warp's pieces lie one behind the other: 128 logits are `pieces` times in each warp.
  const int32_t pieces = (n + 4 * kThreads - 1) / (4 * kThreads);
  const int32_t begin = warp * pieces * 128 + lane * 4;
  // What one warp does alone falls to different ones in the blocks of a multiprocessor, because a
  // warp's place in its block decides which scheduler it has.
  const int alone = static_cast<int>(row * 0x9e3779b9u >> 30);

  PieceBits<T> loaded[kSamplePieces];
  if (in_whole_pieces(logits) && begin + (pieces - 1) * 128 + 4 <= n) {
#pragma unroll
    for (int j = 0; j < kSamplePieces; ++j) {
      if (j < pieces) {
        loaded[j] = *reinterpret_cast<const PieceBits<T>*>(logits + begin + j * 128);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSamplePieces; ++j) {
      if (j < pieces) {
        const LogitPiece<T> piece = load_piece(logits, n, begin + j * 128);
        loaded[j] = __builtin_bit_cast(PieceBits<T>, piece);
      }
    }
  }
  for (int b = threadIdx.x; b < kSampleBins; b += kThreads) {
    shared.bins_count_and_low[b / kBinsPerLane][b % kBinsPerLane] = 0;
    shared.bins_high[b / kBinsPerLane][b % kBinsPerLane] = 0;
    shared.heads[b] = -1;
  }
  if (warp == alone) {
    // In shared memory, where the candidates will be: registers hold the row already.
    auto* const sample = reinterpret_cast<LogitPiece<float>*>(shared.candidates) + lane;
#pragma unroll 2
    for (int i = 0; i < kPivotSample / 128; ++i) {
      const int32_t place = (i * 32 + lane) * (n / (kPivotSample / 4)) & ~3;
      const LogitPiece<T> piece = load_piece(logits, n, place);
      LogitPiece<float> floats;
#pragma unroll
      for (int e = 0; e < 4; ++e) floats.values[e] = to_float(piece.values[e]);
      sample[i * 32] = floats;
    }
    const float pivot = find_pivot(sample, params.pivot_rank);
    if (lane == 0) {
      shared.pivot = pivot;
      shared.number = row_number(params, row);
    }
  }
  float x[kSamplePieces][4];
  float largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < kSamplePieces; ++j) {
    if (j < pieces) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[j][e] = to_float(__builtin_bit_cast(LogitPiece<T>, loaded[j]).values[e]);
        largest = fmaxf(largest, x[j][e]);
      }
    }
  }
  largest = warp_largest(largest);
  if (lane == 0) shared.largest[warp] = largest;
  __syncthreads();
  maximum = -INFINITY;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, shared.largest[w]);
  const float pivot = shared.pivot, range = maximum - pivot;
  // Infinities; nothing to draw from; all the same.
  if (!(range > 1e-30f && range < 1e4f)) return false;

  // Bytes count the candidates in the pieces of a thread, then in those of the lanes before it.
  uint32_t own[kWords]{}, others[kWords], all_lanes[kWords];
  int64_t mass = 0;
#pragma unroll
  for (int j = 0; j < kSamplePieces; ++j) {
    if (j < pieces) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (x[j][e] >= pivot) own[j / 4] += 1u << (j % 4 * 8);
      }
    }
  }
  if (params.top_k == 0) {
#pragma unroll
    for (int j = 0; j < kSamplePieces; ++j) {
      if (j < pieces) {
#pragma unroll
        for (int e = 0; e < 4; ++e) mass += token_weight(fmaxf(x[j][e], -INFINITY), maximum);
      }
    }
    mass = warp_sum(mass);
    if (lane == 0) shared.sums[warp] = mass;
  }
  uint32_t count = 0;
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    const uint32_t until = warp_inclusive_sum(own[word]);
    others[word] = until - own[word];
    all_lanes[word] = __shfl_sync(0xffffffffu, until, 31);
    count += sum_of_bytes(all_lanes[word]);
  }
  if (lane == 0) shared.counts[warp] = static_cast<int32_t>(count);
  __syncthreads();
  const auto warps_count = static_cast<uint32_t>(lane < kWarps ? shared.counts[lane] : 0);
  const auto candidates = static_cast<int32_t>(ptx::warp_sum(warps_count));
  auto before = static_cast<int32_t>(ptx::warp_sum(lane < warp ? warps_count : 0));
  if (candidates < max(params.top_k, 1) || candidates > kMaxCandidates) return false;
#pragma unroll
  for (int j = 0; j < kSamplePieces; ++j) {
    if (j < pieces) {
      if (lane == 0) shared.before[warp * pieces + j] = before;
      float* place = shared.candidates + before + byte_of(others[j / 4], j % 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool reaches = x[j][e] >= pivot;
        if (reaches) *place = x[j][e];
        place += reaches;
      }
      before += byte_of(all_lanes[j / 4], j % 4);
    }
  }
  __syncthreads();

  const int32_t rounds = (candidates + kThreads - 1) / kThreads;
  const int32_t first = warp * rounds * 32 + lane;
  const int32_t end = min(candidates, first + rounds * 32);
  const float scale = __fdividef(4.756828f, range);
#pragma unroll 2
  for (int32_t place = first; place < end; place += 32) {
    const float logit = shared.candidates[place];
    const uint32_t weight = token_weight(logit, maximum);
    const unsigned bin = candidate_bin(logit, maximum, scale);
    const Tally tally = tally_of(weight);
    atomicAdd(&shared.bins_count_and_low[bin / kBinsPerLane][bin % kBinsPerLane],
              tally.count_and_low);
    atomicAdd(&shared.bins_high[bin / kBinsPerLane][bin % kBinsPerLane], tally.high);
    shared.next[place] = static_cast<int16_t>(atomicExch(&shared.heads[bin], place));
    shared.weights[place] = weight;
  }
  __syncthreads();
  if (warp == alone) {
    mass = 0;
    if (params.top_k == 0) {
      for (int w = 0; w < kWarps; ++w) mass += shared.sums[w];
    }
    close_candidates(params.top_k, params.top_p, mass, maximum, shared);
  }
  __syncthreads();
  const int32_t cut_end = shared.cut_end;
  if (cut_end < 0) return false;
  const float cut = shared.cut_logit;
  const auto tally_at = [&](int32_t place) {
    if (place >= end) return Tally{0, 0};
    const float logit = shared.candidates[place];
    const bool is_kept = logit > cut || (logit == cut && place <= cut_end);
    const uint32_t weight = is_kept ? shared.weights[place] : 0;
    return Tally{weight & 1023, weight >> 10};
  };
  Tally kept{0, 0};
#pragma unroll 2
  for (int32_t place = first; place < end; place += 32) kept = kept + tally_at(place);
  kept = warp_sum(kept);
  if (lane == 0) shared.tallies[warp] = kept;
  __syncthreads();
  const Tally in_front = lane < warp ? shared.tallies[lane] : Tally{0, 0};
  int64_t left = shared.target - warp_sum(in_front).mass();
  if (left < 0 || left >= kept.mass()) return true;  // another warp's

  int32_t place = first;
  int found;
#pragma unroll 1
  while (true) {
    const Tally sum = warp_inclusive_sum(tally_at(place));
    found = first_lane(sum.mass() > left);
    if (found >= 0) break;
    left -= from_lane(sum, 31).mass();
    place += 32;
  }
  place += found - lane;
  int32_t hundreds = 0;  // runs of 128 logits up to that candidate
  for (int32_t i = lane; i - lane < kWarps * pieces; i += 32) {
    const bool up_to = i < kWarps * pieces && shared.before[i] <= place;
    hundreds += __popc(__ballot_sync(0xffffffffu, up_to));
  }
  const int32_t run = hundreds - 1;
  const LogitPiece<T> piece = load_piece(logits, n, run * 128 + lane * 4);
  int32_t reached = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) reached += to_float(piece.values[e]) >= pivot;
  int32_t skip = place - shared.before[run] - (warp_inclusive_sum(reached) - reached);
  if (skip >= 0 && skip < reached) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (to_float(piece.values[e]) >= pivot && skip-- == 0) {
        token = run * 128 + lane * 4 + e;
      }
    }
  }
  return true;
}

}  // namespace flexvar
