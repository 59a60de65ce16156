// guided_sample on CUDA: one block samples one row, which it reads from memory once, into
// registers. A sample of the row tells a pivot that a few more than top_k logits reach, and what
// reaches it, the candidates, is copied out in order. A histogram of the candidates holds counts
// and masses at once: one warp finds in it where top-k's limit is reached, then top-p's, ranking
// the tokens of a single bin each time. Every sum is an integer, so the order of threads and of
// atomics does not matter.
//
// Rows that this does not suit (longer than the registers hold, nothing to cut, too many candidates
// or a crowded bin) are read from memory again and again: their thresholds are found by bisection.
#pragma once

#include <cmath>

#include "common/ptx.cuh"
#include "guided_sample/arithmetic.h"

namespace flexvar {

constexpr int kSampleMostWarps = 16;
constexpr int kSamplePieces = 9;   // of four logits: what a thread can hold of a row
constexpr int kPivotSample = 512;  // logits that the pivot is estimated from
constexpr int kPivotSlack = 5;     // how many more of these may reach it
constexpr int kMaxCandidates = 1792;
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
  uint32_t length;     // l
  int32_t vocabulary;  // V
  int32_t top_k;       // 0 (off) to V - 1
  int32_t pivot_rank;  // see guided_sample_pivot_rank
};

// The pivot's place in the sample of a row, from the largest: such that at least top_k logits reach
// it, but for one row in a hundred. 0: no pivot, because all logits matter or candidates would be
// too many.
inline int32_t guided_sample_pivot_rank(int64_t vocabulary, int64_t top_k, double top_p) {
  const bool nucleus = top_p > 0 && top_p < 1;
  if ((top_k == 0 && !nucleus) || vocabulary < 2 * kPivotSample) return 0;
  const auto size = static_cast<double>(vocabulary);
  if (top_k == 0) {  // as many candidates as there is room for, mostly
    return static_cast<int32_t>(kPivotSample * fmin(0.7 * kMaxCandidates / size, 0.9));
  }
  const double share = static_cast<double>(top_k) / size;
  const double deviation = std::sqrt(kPivotSample * share * (1 - share));
  const double rank = kPivotSample * share + 2.5 * deviation + 2;
  const double most = (rank + kPivotSlack + 2.5 * deviation) / kPivotSample * size;
  return most <= kMaxCandidates ? static_cast<int32_t>(rank) : 0;
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

struct SampleStorage {
  // A lane's bins are apart from the next one's: four words behind them keep both in other banks.
  alignas(16) uint32_t bins_count_and_low[32][kBinsPerLane + 4];
  alignas(16) uint32_t bins_high[32][kBinsPerLane + 4];
  int32_t heads[kSampleBins];                    // of lists of the candidates in a bin; -1: none
  int16_t next[kMaxCandidates];                  // the next in the same list
  alignas(16) float candidates[kMaxCandidates];  // in order of indices
  uint32_t weights[kMaxCandidates];
  int32_t before[kSampleMostWarps * kSamplePieces];  // candidates in front of 128 logits
  int32_t counts[kSampleMostWarps];
  float largest[kSampleMostWarps];
  Tally tallies[kSampleMostWarps];
  Measure measures[kSampleMostWarps];
  int64_t sums[kSampleMostWarps];
  uint64_t number;  // random
  int64_t target;
  float pivot, cut_logit;
  int32_t cut_end, ties, warp;
};

template <class Number>
__device__ inline Number warp_inclusive_sum(Number sum) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const Number other = __shfl_up_sync(0xffffffffu, sum, lanes);
    if (static_cast<int>(threadIdx.x) % 32 >= lanes) sum += other;
  }
  return sum;
}
__device__ inline Tally warp_inclusive_sum(Tally sum) {
  return {warp_inclusive_sum(sum.count_and_low), warp_inclusive_sum(sum.high)};
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

// --- Rows that registers hold ------------------------------------------------------------------

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

// --- Rows in memory ----------------------------------------------------------------------------

// A row's logits in fp32, NaN as -inf. With +inf among them, see key_beside_infinity. A warp has a
// part of the row, in order.
template <class T>
struct RowLogits {
  const T* logits;
  int32_t n, begin, end;  // of the row; of this warp's part
  bool infinite;
  __device__ float operator[](int32_t i) const {
    const float logit = fmaxf(to_float(logits[i]), -INFINITY);
    return !infinite ? logit : logit == INFINITY ? 0.0f : -INFINITY;
  }
  template <class Use>
  __device__ void for_each(Use use) const {
#pragma unroll 4
    for (int32_t i = begin + static_cast<int32_t>(threadIdx.x) % 32; i < end; i += 32) {
      use((*this)[i]);
    }
  }
};

template <int kWarps>
__device__ inline float block_largest(float largest, SampleStorage& shared) {
  largest = warp_largest(largest);
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.largest[w]);
  __syncthreads();
  return largest;
}

// Of the logits in [low, high): the sum of the values of those from `split` on and the least of
// them, and the greatest of those below.
template <int kWarps, class T, class ValueOf>
__device__ inline Measure measure(const RowLogits<T>& row, float low, float split, float high,
                                  ValueOf value_of, SampleStorage& shared) {
  Measure all{0, INFINITY, -INFINITY};
  row.for_each([&](float logit) {
    if (logit < low || logit >= high) return;
    if (logit >= split) {
      all.sum += value_of(logit);
      all.least = fminf(all.least, logit);
    } else {
      all.greatest = fmaxf(all.greatest, logit);
    }
  });
  all = {warp_sum(all.sum), -warp_largest(-all.least), warp_largest(all.greatest)};
  if (threadIdx.x % 32 == 0) shared.measures[threadIdx.x / 32] = all;
  __syncthreads();
  all = shared.measures[0];
  for (int w = 1; w < kWarps; ++w) {
    const Measure other = shared.measures[w];
    all = {all.sum + other.sum, fminf(all.least, other.least), fmaxf(all.greatest, other.greatest)};
  }
  __syncthreads();
  return all;
}

// The logit at which `limit` is reached in descending order, and the value of those above it.
struct Reached {
  float logit;
  int64_t above;
};

// From `floor` on the limit is reached. Below kSampleReach under the maximum it does not matter
// where: the result is -inf then.
template <int kWarps, class T, class ValueOf>
__device__ inline Reached find_reached(const RowLogits<T>& row, float floor, float maximum,
                                       int64_t limit, ValueOf value_of, SampleStorage& shared) {
  int32_t low = order_key(__float_as_int(floor));
  int32_t high = order_key(__float_as_int(maximum)) + 1;
  int64_t above = 0;
  const float reach = maximum - kSampleReach;
  bool first = floor < reach;
  while (low + 1 != high) {
    const float low_logit = logit_of_key(low), high_logit = logit_of_key(high);
    const float middle =
        first ? reach : low_logit + 0.5f * (fminf(high_logit, maximum) - low_logit);
    const int32_t split = min(high - 1, max(low + 1, order_key(__float_as_int(middle))));
    const Measure part =
        measure<kWarps>(row, low_logit, logit_of_key(split), high_logit, value_of, shared);
    if (above + part.sum >= limit) {
      low = order_key(__float_as_int(part.least));
    } else {
      if (first) return {-INFINITY, 0};
      above += part.sum;
      high = order_key(__float_as_int(part.greatest)) + 1;
    }
    first = false;
  }
  return {logit_of_key(low), above};
}

// Draws the row's token: left with one thread; the others' stays as it is. `maximum`: the largest
// logit, finite.
template <int kThreads, class T>
__device__ inline void draw_from_row(const GuidedSampleCudaParams<T>& params,
                                     const RowLogits<T>& row, float maximum, int32_t& token,
                                     SampleStorage& shared) {
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto weight = [&](float logit) { return int64_t{token_weight(logit, maximum)}; };
  // Kept are the logits above `cut.logit`, and the first `ties` of those at it.
  Reached cut{-INFINITY, 0};
  int64_t ties = 0, all = 0;
  const bool nucleus = params.top_p > 0 && params.top_p < 1;
  if (params.top_k > 0) {
    cut = find_reached<kWarps>(
        row, -INFINITY, maximum, params.top_k, [](float) { return int64_t{1}; }, shared);
    ties = params.top_k - cut.above;
  }
  if (nucleus) {
    const int32_t above_cut = order_key(__float_as_int(cut.logit)) + 1;
    all = measure<kWarps>(row, -INFINITY, logit_of_key(above_cut), INFINITY, weight, shared).sum +
          ties * weight(cut.logit);
    const int64_t limit = min(mass_limit(all, params.top_p), all);
    cut = find_reached<kWarps>(row, cut.logit, maximum, limit, weight, shared);
    const int64_t each = weight(cut.logit);
    ties = (limit - cut.above + each - 1) / each;
  }
  const int64_t at_cut = weight(cut.logit);
  int64_t own = 0;
  uint32_t own_ties = 0;
  row.for_each([&](float logit) {
    if (logit > cut.logit) own += weight(logit);
    own_ties += logit == cut.logit;
  });
  own = warp_sum(own);
  own_ties = ptx::warp_sum(own_ties);
  if (lane == 0) {
    shared.sums[warp] = own;
    shared.counts[warp] = static_cast<int32_t>(own_ties);
  }
  __syncthreads();
  if (warp == 0) {
    const int64_t count = lane < kWarps ? shared.counts[lane] : 0;
    const int64_t before = warp_inclusive_sum(count) - count;
    const int64_t kept = max(int64_t{0}, min(count, ties - before));
    const int64_t sum = (lane < kWarps ? shared.sums[lane] : 0) + kept * at_cut;
    const int64_t until = warp_inclusive_sum(sum);
    const int64_t target = scaled_draw(shared.number, __shfl_sync(0xffffffffu, until, 31));
    const int found = first_lane(until > target);
    if (lane == found) {
      shared.warp = lane;
      shared.target = target - (until - sum);
      shared.ties = static_cast<int32_t>(max(int64_t{0}, ties - before));
    }
  }
  __syncthreads();
  if (warp != shared.warp) return;
  int64_t left = shared.target;
  int32_t left_ties = shared.ties;
#pragma unroll 1
  for (int32_t start = row.begin; start < row.end; start += 32) {
    const float logit = start + lane < row.end ? row[start + lane] : -INFINITY;
    const unsigned equal = __ballot_sync(0xffffffffu, logit == cut.logit);
    const bool kept =
        logit > cut.logit || (logit == cut.logit && __popc(equal & ((1u << lane) - 1)) < left_ties);
    left_ties -= __popc(equal);
    const int64_t until = warp_inclusive_sum(kept ? weight(logit) : 0);
    const int found = first_lane(until > left);
    if (found >= 0) {
      if (lane == found) token = start + lane;
      return;
    }
    left -= __shfl_sync(0xffffffffu, until, 31);
  }
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    guided_sample_kernel(GuidedSampleCudaParams<T> params) {
  constexpr int kWarps = kThreads / 32;
  auto& shared = shared_storage<SampleStorage>();
  const int32_t n = params.vocabulary;
  const uint32_t row = blockIdx.x;
  float maximum = -INFINITY;
  int32_t token = -2;  // none of this thread
  if (params.pivot_rank == 0 || n > kThreads * 4 * kSamplePieces ||
      !draw_from_candidates<kThreads>(params, row, maximum, token, shared)) {
    __syncthreads();
    if (threadIdx.x == 0) shared.number = row_number(params, row);
    const int32_t each = (n + kThreads - 1) / kThreads * 32;
    const int32_t begin = min(n, each * static_cast<int32_t>(threadIdx.x / 32));
    RowLogits<T> logits{params.logits + int64_t{row} * n, n, begin, min(n, begin + each), false};
    logits.for_each([&](float logit) { maximum = fmaxf(maximum, logit); });
    maximum = block_largest<kWarps>(maximum, shared);
    if (maximum > -INFINITY) {
      logits.infinite = maximum == INFINITY;
      if (logits.infinite) maximum = 0;  // see key_beside_infinity
      draw_from_row<kThreads>(params, logits, maximum, token, shared);
    } else if (threadIdx.x == 0) {
      token = -1;
    }
  }
  if (token >= -1) params.tokens[row] = token;
}

}  // namespace flexvar
