// A row that is read again and again, from shared or global memory: its thresholds are found by
// bisection.
#pragma once

#include "guided_sample/row.cuh"

namespace flexvar {

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

// Draws the row's token with shared.number: returned by one thread, -2 by the others. `maximum`:
// the largest logit, finite.
template <int kThreads, class T>
__device__ inline int32_t draw_between_thresholds(const GuidedSampleCudaParams<T>& params,
                                                  const RowLogits<T>& row, float maximum,
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
  if (warp != shared.warp) return -2;
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
    if (found >= 0) return lane == found ? start + lane : -2;
    left -= __shfl_sync(0xffffffffu, until, 31);
  }
  return -2;
}

// The same from the row's logits, wherever they lie; -1 if none of them is above -inf. All threads
// have read the logits when the block passes its next barrier.
template <int kThreads, class T>
__device__ inline int32_t draw_by_bisection(const GuidedSampleCudaParams<T>& params,
                                            uint32_t row_index, const T* logits,
                                            SampleStorage& shared) {
  if (threadIdx.x == 0) shared.number = row_number(params, ptx::computed_here(row_index));
  const int32_t n = params.vocabulary;
  const int32_t each = (n + kThreads - 1) / kThreads * 32;
  const int32_t begin = min(n, each * static_cast<int32_t>(threadIdx.x / 32));
  RowLogits<T> row{logits, n, begin, min(n, begin + each), false};
  float maximum = -INFINITY;
  row.for_each([&](float logit) { maximum = fmaxf(maximum, logit); });
  maximum = block_largest<kThreads / 32>(maximum, shared);
  if (maximum == -INFINITY) return threadIdx.x == 0 ? -1 : -2;
  row.infinite = maximum == INFINITY;
  if (row.infinite) maximum = 0;  // see key_beside_infinity
  return draw_between_thresholds<kThreads>(params, row, maximum, shared);
}

}  // namespace flexvar
