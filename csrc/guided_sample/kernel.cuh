// guided_sample on CUDA: one block samples one row, whose keys stay in shared memory (in a global
// workspace where the vocabulary is too large for that).
//
// Thresholds are found by bisecting the key range. The block counts (or weighs) what lies above the
// middle until at most kSpare keys are in question; those are copied out for one warp to finish.
// Every sum is an integer, so the order of threads and of atomics does not matter.
#pragma once

#include "common/cuda.cuh"
#include "guided_sample/arithmetic.h"

namespace flexvar {

constexpr int kSampleThreads = 256, kSampleWarps = kSampleThreads / 32, kSpare = 512;

template <class T>
struct GuidedSampleCudaParams {
  const T* logits;           // [B * l, V]
  const int64_t* seeds;      // [B]
  const int64_t* image_ids;  // [B]
  int64_t* tokens;           // [B * l]
  int32_t* workspace;        // [blocks, guided_sample_words] when the row does not fit, else null
  int64_t rows;              // B * l
  int64_t length;            // l
  int64_t step;
  double top_p;        // 0: off
  int32_t vocabulary;  // V
  int32_t top_k;       // 0 (off) to V - 1
};

// 32-bit words of the row's keys, of what top-k keeps (keys, tokens) and of weights.
FLEXVAR_HOST_DEVICE int64_t guided_sample_words(int64_t vocabulary, int64_t top_k) {
  return top_k > 0 ? vocabulary + 3 * top_k : 2 * vocabulary;
}

struct SampleMass {
  int32_t tokens;
  int64_t weight;  // the number of tokens when there are no weights
};

struct SampleStorage {
  SampleMass sums[2][kSampleWarps];
  int32_t largest[kSampleWarps];
  int32_t spare_keys[kSpare];
  int32_t spare_weights[kSpare];
  int32_t spare_size;
  Threshold threshold;
};

// 16-bit logits leave the low bits of a key without information: bisecting skips them.
template <class T>
constexpr int kKeyShift = 0;
template <>
constexpr int kKeyShift<__half> = 13;
template <>
constexpr int kKeyShift<__nv_bfloat16> = 16;

__device__ inline SampleMass warp_sum(SampleMass mass) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    mass.tokens += __shfl_xor_sync(0xffffffffu, mass.tokens, lanes);
    mass.weight += __shfl_xor_sync(0xffffffffu, mass.weight, lanes);
  }
  return mass;
}

// The sums of the warps before this one (`before`) and of all; `turn` alternates between two sets
// of slots, so that one barrier a call is enough.
__device__ inline SampleMass block_sum(SampleMass mass, SampleStorage& shared, int& turn,
                                       SampleMass* before = nullptr) {
  mass = warp_sum(mass);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) shared.sums[turn][warp] = mass;
  __syncthreads();
  SampleMass all{0, 0};
  for (int w = 0; w < kSampleWarps; ++w) {
    if (before != nullptr && w == warp) *before = all;
    all.tokens += shared.sums[turn][w].tokens;
    all.weight += shared.sums[turn][w].weight;
  }
  turn ^= 1;
  return all;
}

// Shifted keys: from `low` on there is at least the limit's mass, from `high` on less.
struct SampleBracket {
  int32_t low, high;
  SampleMass from_low, from_high;
};

// Narrows the bracket until it is one key wide or holds at most `enough` tokens. keys[first],
// keys[first + stride], … are this thread's; `sum` adds up over the threads.
template <class Sum>
__device__ inline void bisect(SampleBracket& bracket, const int32_t* keys, const int32_t* weights,
                              int32_t n, SampleMass beyond, int64_t limit, int shift,
                              int32_t enough, int first, int stride, Sum sum) {
  while (int64_t{bracket.high} - bracket.low > 1 &&
         bracket.from_low.tokens - bracket.from_high.tokens > enough) {
    const auto middle = static_cast<int32_t>((int64_t{bracket.low} + bracket.high) >> 1);
    const int32_t key = middle * (1 << shift);
    SampleMass mass{0, 0};
    for (int32_t i = first; i < n; i += stride) {
      const bool above = keys[i] >= key;
      mass.tokens += above;
      if (weights != nullptr) mass.weight += above ? weights[i] : 0;
    }
    if (weights == nullptr) mass.weight = mass.tokens;
    mass = sum(mass);
    mass.tokens += beyond.tokens;
    mass.weight += beyond.weight;
    if (mass.weight >= limit) {
      bracket.low = middle;
      bracket.from_low = mass;
    } else {
      bracket.high = middle;
      bracket.from_high = mass;
    }
  }
}

// The threshold of the tokens with less than `limit` mass before them, 0 < limit <= `total`, the
// mass of all. `weights` null: every token weighs 1.
__device__ inline Threshold find_threshold(const int32_t* keys, const int32_t* weights, int32_t n,
                                           int32_t largest, int64_t total, int64_t limit, int shift,
                                           SampleStorage& shared, int& turn) {
  SampleBracket bracket{kMinusInfinityKey >> shift, (largest >> shift) + 1, {n, total}, {0, 0}};
  bisect(bracket, keys, weights, n, {0, 0}, limit, shift, kSpare, threadIdx.x, kSampleThreads,
         [&](SampleMass mass) { return block_sum(mass, shared, turn); });
  if (threadIdx.x == 0) shared.spare_size = 0;
  __syncthreads();
  const bool narrow = bracket.from_low.tokens - bracket.from_high.tokens <= kSpare;
  if (narrow) {
    for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
      const int32_t key = keys[i] >> shift;
      if (key < bracket.low || key >= bracket.high) continue;
      const int32_t slot = atomicAdd(&shared.spare_size, 1);
      shared.spare_keys[slot] = keys[i];
      shared.spare_weights[slot] = weights != nullptr ? weights[i] : 1;
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (narrow) {
      bisect(bracket, shared.spare_keys, shared.spare_weights, shared.spare_size, bracket.from_high,
             limit, shift, 0, threadIdx.x, 32, warp_sum);
    }
    // The weight of one token at the threshold: all of them have the same.
    const SampleMass at{bracket.from_low.tokens - bracket.from_high.tokens,
                        bracket.from_low.weight - bracket.from_high.weight};
    const int64_t weight = at.weight / at.tokens;
    const int32_t low_bits = bracket.low < 0 ? (1 << shift) - 1 : 0;
    if (threadIdx.x == 0) {
      shared.threshold = {bracket.low * (1 << shift) + low_bits,
                          (limit - bracket.from_high.weight + weight - 1) / weight};
    }
  }
  __syncthreads();
  return shared.threshold;
}

// The part of [0, n) that this warp owns, in whole groups of 32.
struct WarpSegment {
  int32_t begin, end;
};
__device__ inline WarpSegment warp_segment(int32_t n) {
  const int32_t groups = (n + 31) / 32, warp = threadIdx.x / 32;
  const int32_t each = (groups + kSampleWarps - 1) / kSampleWarps * 32;
  return {min(n, warp * each), min(n, (warp + 1) * each)};
}

// Calls act(i, kept, rank) for every i in [0, n): whether the threshold keeps token i, and how many
// kept tokens stand before it.
template <class Act>
__device__ inline void for_each_ranked(const int32_t* keys, int32_t n, Threshold threshold,
                                       SampleStorage& shared, int& turn, Act act) {
  const WarpSegment segment = warp_segment(n);
  const int lane = threadIdx.x % 32;
  SampleMass mass{0, 0}, before;  // tokens: above the threshold, weight: number of ties
  for (int32_t i = segment.begin + lane; i < segment.end; i += 32) {
    mass.tokens += keys[i] > threshold.key;
    mass.weight += keys[i] == threshold.key;
  }
  block_sum(mass, shared, turn, &before);
  const unsigned lanes_before = (1u << lane) - 1;
  for (int32_t start = segment.begin; start < segment.end; start += 32) {
    const int32_t i = start + lane;
    const bool above = i < n && keys[i] > threshold.key;
    const bool tie = i < n && keys[i] == threshold.key;
    const unsigned all_above = __ballot_sync(0xffffffffu, above);
    const unsigned all_ties = __ballot_sync(0xffffffffu, tie);
    const int64_t ties = before.weight + __popc(all_ties & lanes_before);
    const int32_t rank = before.tokens + __popc(all_above & lanes_before) +
                         static_cast<int32_t>(min(ties, threshold.ties));
    if (i < n) act(i, above || (tie && ties < threshold.ties), rank);
    before.tokens += __popc(all_above);
    before.weight += __popc(all_ties);
  }
}

// Order keys of a row into keys[]; returns the largest.
template <class T>
__device__ inline int32_t load_keys(const T* logits, int32_t n, int32_t* keys,
                                    SampleStorage& shared) {
  int32_t largest = kMinusInfinityKey;
  for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
    keys[i] = order_key(__float_as_int(to_float(logits[i])));
    largest = max(largest, keys[i]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int w = 0; w < kSampleWarps; ++w) largest = max(largest, shared.largest[w]);
  return largest;
}

// The first element whose inclusive cumulative weight exceeds `draw`, which is less than the
// segment's total. Called by one whole warp.
__device__ inline int32_t find_drawn(const int32_t* weights, WarpSegment segment, int64_t draw) {
  const int lane = threadIdx.x % 32;
  for (int32_t start = segment.begin; start < segment.end; start += 32) {
    int64_t sum = start + lane < segment.end ? weights[start + lane] : 0;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, lanes);
      if (lane >= lanes) sum += other;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, sum > draw);
    if (beyond != 0) return start + __ffs(static_cast<int>(beyond)) - 1;
    draw -= __shfl_sync(0xffffffffu, sum, 31);
  }
  return segment.end - 1;
}

template <class T>
__device__ inline void sample_row(const GuidedSampleCudaParams<T>& params, int64_t row,
                                  int32_t* words, SampleStorage& shared) {
  constexpr int kShift = kKeyShift<T>;
  int32_t n = params.vocabulary;
  int32_t* keys = words;
  int32_t* const kept_keys = words + n;
  int32_t* const kept_tokens = kept_keys + params.top_k;
  int32_t* const weights = kept_tokens + params.top_k;
  int turn = 0;

  int32_t largest = load_keys(params.logits + row * n, n, keys, shared);
  if (largest == kMinusInfinityKey) {
    if (threadIdx.x == 0) params.tokens[row] = -1;
    return;
  }
  if (largest == kInfinityKey) {
    for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
      keys[i] = key_beside_infinity(keys[i]);
    }
    largest = 0;
    __syncthreads();
  }
  const float maximum = logit_of_key(largest);
  if (params.top_k > 0) {
    const Threshold threshold =
        find_threshold(keys, nullptr, n, largest, n, params.top_k, kShift, shared, turn);
    for_each_ranked(keys, n, threshold, shared, turn, [&](int32_t i, bool kept, int32_t rank) {
      if (!kept) return;
      kept_keys[rank] = keys[i];
      kept_tokens[rank] = i;
    });
    n = params.top_k;
    keys = kept_keys;
    __syncthreads();
  }
  SampleMass mass{0, 0};
  for (int32_t i = threadIdx.x; i < n; i += kSampleThreads) {
    weights[i] = static_cast<int32_t>(token_weight(logit_of_key(keys[i]), maximum));
    mass.weight += weights[i];
  }
  mass = block_sum(mass, shared, turn);
  if (params.top_p > 0 && params.top_p < 1) {
    const int64_t limit = mass_limit(mass.weight, params.top_p);
    const Threshold threshold =
        find_threshold(keys, weights, n, largest, mass.weight, limit, kShift, shared, turn);
    for_each_ranked(keys, n, threshold, shared, turn, [&](int32_t i, bool kept, int32_t) {
      if (!kept) weights[i] = 0;
    });
    __syncthreads();
  }
  const WarpSegment segment = warp_segment(n);
  mass = {0, 0};
  for (int32_t i = segment.begin + threadIdx.x % 32; i < segment.end; i += 32) {
    mass.weight += weights[i];
  }
  const int64_t own = warp_sum(mass).weight;
  SampleMass before;
  const int64_t total = block_sum(mass, shared, turn, &before).weight;
  const int64_t image = row / params.length;
  const int64_t draw = draw_below(total, params.seeds[image], params.image_ids[image], params.step,
                                  row % params.length) -
                       before.weight;
  if (draw >= 0 && draw < own) {  // this warp's segment
    const int32_t drawn = find_drawn(weights, segment, draw);
    if (threadIdx.x % 32 == 0) {
      params.tokens[row] = params.top_k > 0 ? kept_tokens[drawn] : drawn;
    }
  }
}

template <class T, bool kInShared>
__global__ void __launch_bounds__(kSampleThreads, 2)
    guided_sample_kernel(GuidedSampleCudaParams<T> params) {
  auto& shared = shared_storage<SampleStorage>();
  int32_t* words;
  if constexpr (kInShared) {
    words = dynamic_shared<int32_t>();
  } else {
    words = params.workspace + blockIdx.x * guided_sample_words(params.vocabulary, params.top_k);
  }
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    sample_row(params, row, words, shared);
    __syncthreads();  // before the next row's keys take the place of these
  }
}

}  // namespace flexvar
