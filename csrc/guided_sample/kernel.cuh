// guided_sample on CUDA: one block samples one row, which it reads from memory once (from then on
// out of shared memory, where it fits).
//
// Top-k passes over the row once: the histogram of a sample tells a pivot that a few more than k
// logits reach, and what reaches it is copied out. A cut, top-k's or top-p's, is the token at which
// a limit of mass is reached in descending order: in a bin of a histogram of the logits, which one
// warp ranks, or another histogram, of order keys, divides while it holds too many. Every sum is an
// integer, so the order of threads and of atomics does not matter.
#pragma once

#include <cmath>

#include "common/ptx.cuh"
#include "guided_sample/arithmetic.h"

namespace flexvar {

// Few threads: what each does besides its share of the row is half the work.
constexpr int kSampleThreads = 128, kSampleWarps = kSampleThreads / 32;
constexpr int kSampleBins = 512, kLog2SampleBins = 9, kBinsPerLane = kSampleBins / 32;
constexpr int kPivotSample = 512;  // logits that the pivot is estimated from
constexpr int kMaxCandidates = 2048;
// Bins for each unit of logits: tokens further than 21.5 below the largest logit weigh nothing.
constexpr float kRowBins = kSampleBins / 21.5f;

template <class T>
struct GuidedSampleCudaParams {
  const T* logits;           // [B * l, V]
  const int64_t* seeds;      // [B]
  const int64_t* image_ids;  // [B]
  int64_t* tokens;           // [B * l]
  int64_t rows;              // B * l
  int64_t length;            // l
  int64_t step;
  double top_p;        // 0: off
  int32_t vocabulary;  // V
  int32_t top_k;       // 0 (off) to V - 1
  int32_t pivot_rank;  // see guided_sample_pivot_rank
};

// Their weights take the place of the row.
FLEXVAR_HOST_DEVICE int64_t guided_sample_most_candidates(int64_t vocabulary) {
  return vocabulary / 2 < kMaxCandidates ? vocabulary / 2 : kMaxCandidates;
}

// The pivot's place in the sample of a row, from the largest (down to the end of its bin): such
// that at least top_k logits reach it, but for one row in a hundred. 0: candidates of the whole row
// would be too many, or no fewer.
inline int32_t guided_sample_pivot_rank(int64_t vocabulary, int64_t top_k) {
  if (top_k == 0 || vocabulary < 2 * kPivotSample) return 0;
  const double share = static_cast<double>(top_k) / static_cast<double>(vocabulary);
  const double deviation = std::sqrt(kPivotSample * share * (1 - share));
  const double rank = kPivotSample * share + 2.5 * deviation + 2;
  const double most = (rank + 3 * deviation) / kPivotSample * static_cast<double>(vocabulary);
  const auto limit = static_cast<double>(guided_sample_most_candidates(vocabulary));
  return most <= limit ? static_cast<int32_t>(rank) : 0;
}

// Dynamic shared memory: the row, at the place within 16 bytes that it has in memory and filled up
// to whole words of bits, and, with a pivot, the candidates and a bit for each logit.
template <class T>
FLEXVAR_HOST_DEVICE int64_t guided_sample_shared_bytes(int64_t vocabulary, int32_t pivot_rank) {
  const int64_t words = (vocabulary + 31) / 32;
  const int64_t row = 16 + words * 32 * static_cast<int64_t>(sizeof(T));
  return pivot_rank == 0 ? row : row + kMaxCandidates * 4 + words * 4;
}

// Kept are logits above `logit`, and those at it in front of `end`.
struct Cut {
  float logit;
  int32_t end;
  __device__ bool keeps(float other, int32_t index) const {
    return other > logit || (other == logit && index < end);
  }
};

struct SampleStorage {
  // A 32nd of the bins is one lane's to add up: a gap behind it keeps lanes in different banks.
  unsigned long long histogram[kSampleBins + 32];
  int64_t sums[kSampleWarps];
  int64_t before, limit, target;
  float largest[kSampleWarps];
  float member_logits[32];
  int32_t member_indices[32];
  int32_t members, low, high, bin, warp, found;
  Cut cut;
};
// What that takes of a block's shared memory: the dynamic part begins at a multiple of 128 bytes
// (dynamic_shared).
constexpr int64_t kSampleStaticBytes = (int64_t{sizeof(SampleStorage)} + 127) / 128 * 128;

__device__ inline int bin_slot(int bin) { return bin + bin / kBinsPerLane; }

// A row's logits in fp32, NaN as -inf. With +inf among them, see key_beside_infinity.
template <class T>
struct RowLogits {
  const T* logits;
  bool infinite;
  __device__ float operator[](int32_t i) const {
    const float logit = fmaxf(to_float(logits[i]), -INFINITY);
    return !infinite ? logit : logit == INFINITY ? 0.0f : -INFINITY;
  }
};

template <class T>
struct SampledLogits {
  RowLogits<T> row;
  int32_t n;  // of the row
  __device__ float operator[](int32_t i) const {
    return row[static_cast<int32_t>(int64_t{i} * n / kPivotSample)];
  }
};

template <class Sum>
__device__ inline Sum warp_inclusive_sum(Sum sum) {
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const Sum other = __shfl_up_sync(0xffffffffu, sum, lanes);
    if (static_cast<int>(threadIdx.x) % 32 >= lanes) sum += other;
  }
  return sum;
}

// The part of [0, n) that belongs to this thread when they share it in order. An odd number of
// elements each, so that lanes that walk side by side are in different banks.
struct Chunk {
  int32_t begin, end;
};
__device__ inline Chunk thread_chunk(int32_t n) {
  const int64_t each = (n + kSampleThreads - 1) / kSampleThreads | 1;
  const auto begin = static_cast<int32_t>(min(int64_t{n}, each * threadIdx.x));
  return {begin, static_cast<int32_t>(min(int64_t{n}, begin + each))};
}

// The first i in [0, n) at which the sum of value_of(0) to value_of(i) exceeds target_of(the sum
// of all).
template <class ValueOf, class TargetOf>
__device__ inline int32_t find_in_order(int32_t n, ValueOf value_of, TargetOf target_of,
                                        SampleStorage& shared) {
  const Chunk chunk = thread_chunk(n);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t own = 0;
  for (int32_t i = chunk.begin; i < chunk.end; ++i) own += value_of(i);
  const int64_t until = warp_inclusive_sum(own);
  if (lane == 31) shared.sums[warp] = until;
  __syncthreads();
  if (warp == 0) {
    const int64_t sum = lane < kSampleWarps ? shared.sums[lane] : 0;
    const int64_t sums = warp_inclusive_sum(sum);
    const int64_t target = target_of(__shfl_sync(0xffffffffu, sums, 31));
    if (sums - sum <= target && target < sums) {
      shared.warp = lane;
      shared.target = target - (sums - sum);
    }
  }
  __syncthreads();
  int64_t sum = until - own;
  const int64_t target = shared.target;
  if (warp == shared.warp && sum <= target && target < until) {
    int32_t i = chunk.begin;
    while ((sum += value_of(i)) <= target) ++i;
    shared.found = i;
  }
  __syncthreads();
  return shared.found;
}

// Makes a histogram and finds the bin in which the limit is reached: left in `shared`, with the
// mass before it. bin_of(logit) grows as logits fall, and is kSampleBins for those that take no
// part, of which there are none in the first histogram.
template <class Mass, bool kFirst, class Logits, class MassOf, class BinOf, class LimitOf>
__device__ inline void find_bin(const Logits& logits, int32_t n, MassOf mass_of, BinOf bin_of,
                                int64_t before, LimitOf limit_of, SampleStorage& shared) {
  auto* const histogram = reinterpret_cast<Mass*>(shared.histogram);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int b = threadIdx.x; b < kSampleBins + 32; b += kSampleThreads) histogram[b] = 0;
  __syncthreads();
#pragma unroll kFirst ? 4 : 1
  for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
    const float logit = logits[i];
    const int bin = bin_of(logit);
    if (!kFirst && bin == kSampleBins) continue;
    const Mass mass = mass_of(logit, i);
    if (mass != 0) atomicAdd(&histogram[bin_slot(bin)], mass);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const Mass* const bins = histogram + lane * (kBinsPerLane + 1);
    int64_t own = 0;
    for (int b = 0; b < kBinsPerLane; ++b) own += static_cast<int64_t>(bins[b]);
    const int64_t until = warp_inclusive_sum(own);
    const int64_t all = __shfl_sync(0xffffffffu, until, 31);
    const int64_t limit = limit_of(all);
    int64_t sum = before + until - own;
    if (sum < limit && limit <= sum + own) {
      int b = 0;
      for (; sum + static_cast<int64_t>(bins[b]) < limit; ++b) sum += bins[b];
      shared.bin = lane * kBinsPerLane + b;
      shared.before = sum;
      shared.limit = limit;
    }
    if (lane == 0) {
      shared.members = 0;
      shared.low = INT32_MAX;
      shared.high = INT32_MIN;
    }
  }
  __syncthreads();
}

// Leaves in `shared` how many logits are in the bin that was found, and the first 32, or, with
// more, the range of their order keys.
template <bool kFirst, class Logits, class BinOf>
__device__ inline void collect_members(const Logits& logits, int32_t n, BinOf bin_of,
                                       SampleStorage& shared) {
  const int bin = shared.bin;
#pragma unroll kFirst ? 4 : 1
  for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
    const float logit = logits[i];
    if (bin_of(logit) != bin) continue;
    const int32_t member = atomicAdd(&shared.members, 1);
    if (member < 32) {
      shared.member_logits[member] = logit;
      shared.member_indices[member] = i;
    }
  }
  __syncthreads();
  if (shared.members <= 32) return;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
    const float logit = logits[i];
    if (bin_of(logit) != bin) continue;
    const int32_t key = order_key(__float_as_int(logit));
    atomicMin(&shared.low, key);
    atomicMax(&shared.high, key);
  }
  __syncthreads();
}

// The bin of a first histogram, with `bins` for each unit that a logit is below `maximum`; the last
// holds all that is further below.
__device__ inline int first_bin(float logit, float maximum, float bins) {
  return min(kSampleBins - 1, __float2int_rz((maximum - logit) * bins));
}

// The cut that keeps the tokens with less than `limit` mass before them in descending order of
// logits, then of indices; limit_of(mass of all) is at least 1 and at most that, mass_of(logit,
// index) not negative. Mass: what holds the sum of all masses; maximum, bins: see first_bin.
template <class Mass, class Logits, class MassOf, class LimitOf>
__device__ inline Cut find_cut(const Logits& logits, int32_t n, float maximum, float bins,
                               MassOf mass_of, LimitOf limit_of, SampleStorage& shared) {
  const auto bin_of = [&](float logit) { return first_bin(logit, maximum, bins); };
  find_bin<Mass, true>(logits, n, mass_of, bin_of, 0, limit_of, shared);
  collect_members<true>(logits, n, bin_of, shared);
  const int64_t limit = shared.limit;
  while (shared.members > 32 && shared.low != shared.high) {
    const int32_t high = shared.high;
    const uint32_t range = static_cast<uint32_t>(high) - static_cast<uint32_t>(shared.low);
    const int shift = max(0, 32 - kLog2SampleBins - __clz(static_cast<int>(range)));
    const auto bin_of_key = [&](float logit) {
      const int32_t key = order_key(__float_as_int(logit));
      const uint32_t below = static_cast<uint32_t>(high) - static_cast<uint32_t>(key);
      return below > range ? kSampleBins : static_cast<int>(below >> shift);
    };
    find_bin<Mass, false>(
        logits, n, mass_of, bin_of_key, shared.before, [&](int64_t) { return limit; }, shared);
    collect_members<false>(logits, n, bin_of_key, shared);
  }
  const int64_t before = shared.before;
  const int32_t members = shared.members;
  if (members > 32) {  // all the same
    const float highest = logit_of_key(shared.high);
    const int32_t last = find_in_order(
        n, [&](int32_t i) { return logits[i] == highest ? mass_of(highest, i) : 0; },
        [&](int64_t) { return limit - before - 1; }, shared);
    return {highest, last + 1};
  }
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    const bool member = lane < members;
    const float logit = member ? shared.member_logits[lane] : maximum;
    const int32_t index = member ? shared.member_indices[lane] : n;
    const int64_t own = member ? mass_of(logit, index) : 0;
    int64_t sum = before;
#pragma unroll 1
    for (int other = 0; other < members; ++other) {
      const float other_logit = shared.member_logits[other];
      const bool in_front =
          other_logit > logit || (other_logit == logit && shared.member_indices[other] < index);
      const int64_t mass = __shfl_sync(0xffffffffu, own, other);
      if (in_front) sum += mass;
    }
    if (sum < limit && limit <= sum + own) shared.cut = {logit, index + 1};
  }
  __syncthreads();
  return shared.cut;
}

// The place among `logits` of the token that is drawn for `row`; maximum, bins: see first_bin.
// `weights`: room to keep them, or null to compute them whenever they are needed.
template <class T, class Logits>
__device__ inline int32_t draw(const GuidedSampleCudaParams<T>& params, int64_t row,
                               const Logits& logits, int32_t n, float maximum, float bins,
                               uint32_t* weights, SampleStorage& shared) {
  if (weights != nullptr) {
    for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
      weights[i] = token_weight(logits[i], maximum);
    }
  }
  Cut cut{-INFINITY, INT32_MAX};
  if (params.top_k > 0) {
    cut = find_cut<unsigned>(
        logits, n, maximum, bins, [](float, int32_t) { return 1u; },
        [&](int64_t) { return int64_t{params.top_k}; }, shared);
  }
  const auto weight = [&](float logit, int32_t i) {
    const uint32_t all = weights != nullptr ? weights[i] : token_weight(logit, maximum);
    return all & -static_cast<uint32_t>(cut.keeps(logit, i));
  };
  if (params.top_p > 0 && params.top_p < 1) {
    cut = find_cut<unsigned long long>(
        logits, n, maximum, bins, weight,
        [&](int64_t all) { return min(mass_limit(all, params.top_p), all); }, shared);
  }
  return find_in_order(
      n, [&](int32_t i) { return weight(logits[i], i); },
      [&](int64_t all) {
        const int64_t image = row / params.length;
        return draw_below(all, params.seeds[image], params.image_ids[image], params.step,
                          row % params.length);
      },
      shared);
}

template <class T>
struct alignas(16) LogitPiece {
  T values[16 / sizeof(T)];
};

// Copies a row to `place`, which lies as far behind a multiple of 16 bytes as the row does, and NaN
// behind it; returns this thread's largest logit. NaN counts as -inf.
template <class T>
__device__ inline float stage_row(const T* logits, int32_t n, T* place) {
  constexpr int kPiece = 16 / sizeof(T);
  const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  const int32_t head = min(n, (kPiece - past) % kPiece), pieces = (n - head) / kPiece;
  for (int32_t p = threadIdx.x; p < pieces; p += kSampleThreads) {
    ptx::cp_async<16>(place + head + p * kPiece, logits + head + p * kPiece);
  }
  ptx::cp_async_commit();
  float largest = -INFINITY;
  const int32_t loose = n - pieces * kPiece;  // at both ends, fewer than there are threads
  if (static_cast<int32_t>(threadIdx.x) < loose) {
    const int32_t i = static_cast<int32_t>(threadIdx.x) < head
                          ? static_cast<int32_t>(threadIdx.x)
                          : static_cast<int32_t>(threadIdx.x) + pieces * kPiece;
    place[i] = logits[i];
    largest = fmaxf(largest, to_float(place[i]));
  }
  if (static_cast<int>(threadIdx.x) < (32 - n % 32) % 32) {
    place[n + static_cast<int32_t>(threadIdx.x)] = from_float<T>(NAN);
  }
  ptx::cp_async_wait();
  for (int32_t p = threadIdx.x; p < pieces; p += kSampleThreads) {
    const auto piece = *reinterpret_cast<const LogitPiece<T>*>(place + head + p * kPiece);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) largest = fmaxf(largest, to_float(piece.values[j]));
  }
  return largest;
}

__device__ inline float block_largest(float largest, SampleStorage& shared) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int w = 0; w < kSampleWarps; ++w) largest = fmaxf(largest, shared.largest[w]);
  return largest;
}

// A bit for each of n logits, in words of 32: of this thread's words, the bits that are set in the
// words before and in these.
struct BitCount {
  Chunk words;
  int32_t before, own, all;
};

// Marks the logits that reach `pivot`, a number.
template <class T>
__device__ inline BitCount mark(const T* logits, int32_t n, float pivot, unsigned* bits,
                                SampleStorage& shared) {
  const int32_t words = (n + 31) / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 4
  for (int32_t w = warp; w < words; w += kSampleWarps) {
    const unsigned word = __ballot_sync(0xffffffffu, to_float(logits[w * 32 + lane]) >= pivot);
    if (lane == 0) bits[w] = word;
  }
  __syncthreads();
  const int32_t each = (words + kSampleThreads - 1) / kSampleThreads;
  const int32_t begin = min(words, each * static_cast<int32_t>(threadIdx.x));
  BitCount count{{begin, min(words, begin + each)}, 0, 0, 0};
#pragma unroll 1
  for (int32_t w = count.words.begin; w < count.words.end; ++w) count.own += __popc(bits[w]);
  const int32_t until = warp_inclusive_sum(count.own);
  if (lane == 31) shared.sums[warp] = until;
  __syncthreads();
  count.before = until - count.own;
  for (int w = 0; w < kSampleWarps; ++w) {
    const auto sum = static_cast<int32_t>(shared.sums[w]);
    if (w < warp) count.before += sum;
    count.all += sum;
  }
  return count;
}

// The token drawn from the logits that reach the pivot, by the one thread that `count`s it; the
// others, and all of them where too few or too many reach it, get -1 and false.
template <class T>
__device__ inline bool draw_from_candidates(const GuidedSampleCudaParams<T>& params, int64_t row,
                                            const T* logits, float maximum, float* candidates,
                                            SampleStorage& shared, int32_t& token) {
  const int32_t n = params.vocabulary;
  const RowLogits<T> row_logits{logits, false};
  find_bin<unsigned, true>(
      SampledLogits<T>{row_logits, n}, kPivotSample, [](float, int32_t) { return 1u; },
      [&](float logit) { return first_bin(logit, maximum, kRowBins); }, 0,
      [&](int64_t) { return int64_t{params.pivot_rank}; }, shared);
  const float pivot = maximum - static_cast<float>(shared.bin + 1) / kRowBins;
  auto* const bits = reinterpret_cast<unsigned*>(candidates + kMaxCandidates);
  const BitCount count = mark(logits, n, pivot, bits, shared);
  if (count.all < params.top_k || count.all > guided_sample_most_candidates(n)) return false;
  int32_t rank = count.before;
  for (int32_t w = count.words.begin; w < count.words.end; ++w) {
    for (unsigned word = bits[w]; word != 0; word &= word - 1) {
      candidates[rank++] = row_logits[w * 32 + __ffs(static_cast<int>(word)) - 1];
    }
  }
  __syncthreads();
  auto* const weights = dynamic_shared<uint32_t>();  // the row is no longer needed
  int32_t left = draw(params, row, candidates, count.all, maximum, kSampleBins / (maximum - pivot),
                      weights, shared) -
                 count.before;
  if (left >= 0 && left < count.own) {
    int32_t w = count.words.begin;
    while (left >= __popc(bits[w])) left -= __popc(bits[w++]);
    unsigned word = bits[w];
    for (; left > 0; --left) word &= word - 1;
    token = w * 32 + __ffs(static_cast<int>(word)) - 1;
  }
  return true;
}

template <class T, bool kInShared>
__global__ void __launch_bounds__(kSampleThreads, 6)
    guided_sample_kernel(GuidedSampleCudaParams<T> params) {
  auto& shared = shared_storage<SampleStorage>();
  const int32_t n = params.vocabulary;
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* logits = params.logits + row * n;
    float maximum = -INFINITY;
    if constexpr (kInShared) {
      T* const place = dynamic_shared<T>() + reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T);
      maximum = stage_row(logits, n, place);
      logits = place;
    } else {
      for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
        maximum = fmaxf(maximum, to_float(logits[i]));
      }
    }
    maximum = block_largest(maximum, shared);
    int32_t token = -1;
    if (maximum > -INFINITY) {
      const bool infinite = maximum == INFINITY;
      if (infinite) maximum = 0;  // see key_beside_infinity
      bool drawn = false;
      if (kInShared && params.pivot_rank > 0 && !infinite) {
        auto* const behind_row =
            dynamic_shared<unsigned char>() + guided_sample_shared_bytes<T>(n, 0);
        drawn = draw_from_candidates(params, row, logits, maximum,
                                     reinterpret_cast<float*>(behind_row), shared, token);
      }
      if (!drawn) {
        const int32_t place = draw(params, row, RowLogits<T>{logits, infinite}, n, maximum,
                                   kRowBins, nullptr, shared);
        if (threadIdx.x == 0) token = place;
      }
    }
    if (token >= 0 || (threadIdx.x == 0 && maximum == -INFINITY)) params.tokens[row] = token;
    __syncthreads();  // before the next row takes the place of this one
  }
}

}  // namespace flexvar
