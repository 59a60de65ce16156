// The draw from all tokens of a row, where neither top-k nor top-p cuts any off.
#pragma once

#include "guided_sample/resident.cuh"

namespace flexvar {

// Draws the token of a resident row: returned by one thread, -2 by the others; -1 if no logit is
// above -inf. `begin_next` runs once the resident row is no longer needed, and this function waits
// for the copies that it begins.
template <int kThreads, class T, class BeginNext>
__device__ inline int32_t draw_from_all(const GuidedSampleCudaParams<T>& params, uint32_t row,
                                        const T* resident, BeginNext begin_next,
                                        SampleStorage& shared) {
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t n = params.vocabulary, pieces = params.pieces;
  const auto begin = static_cast<int32_t>(threadIdx.x) * pieces * 4;
  if (threadIdx.x == 0) shared.number = row_number(params, ptx::computed_here(row));
  float maximum = -INFINITY;
#pragma unroll
  for (int j = 0; j < kSamplePieces; ++j) {
    if (j < pieces) {
      const auto piece = *reinterpret_cast<const LogitPiece<T>*>(resident + begin + j * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) maximum = fmaxf(maximum, to_float(piece.values[e]));
    }
  }
  maximum = warp_largest(maximum);
  if (lane == 0) shared.largest[warp] = maximum;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, shared.largest[w]);

  const bool infinite = maximum == INFINITY;
  if (infinite) maximum = 0;  // see key_beside_infinity
  const auto beside_infinity = [](float logit) { return logit == INFINITY ? 0.0f : -INFINITY; };
  int64_t own = 0;
  if (infinite) {
    for (int32_t i = 0; i < pieces * 4; ++i) {
      own += token_weight(beside_infinity(to_float(resident[begin + i])), maximum);
    }
  } else if (maximum > -INFINITY) {
    own = mass_of_part(resident + begin, pieces, maximum);
  }
  const int64_t lanes_until = warp_inclusive_sum(own);
  if (lane == 31) shared.sums[warp] = lanes_until;
  __syncthreads();
  begin_next();
  const int64_t warps_until = warp_inclusive_sum(lane < kWarps ? shared.sums[lane] : int64_t{0});
  const int64_t all = __shfl_sync(0xffffffffu, warps_until, 31);
  const int64_t before = __shfl_sync(0xffffffffu, warps_until, max(warp - 1, 0));
  int64_t left = scaled_draw(shared.number, all) - (warp > 0 ? before : 0);
  ptx::cp_async_wait();
  __syncthreads();
  if (all == 0) return threadIdx.x == 0 ? -1 : -2;
  const int found = first_lane(lanes_until > left);
  if (left < 0 || found < 0) return -2;  // another warp's
  left -= __shfl_sync(0xffffffffu, lanes_until - own, found);
  const int32_t first = __shfl_sync(0xffffffffu, begin, found);
  const T* const logits = params.logits + int64_t{row} * n;
#pragma unroll 1
  for (int32_t i = first + lane;; i += 32) {
    float logit = i < min(n, first + pieces * 4) ? to_float(logits[i]) : -INFINITY;
    if (infinite) logit = beside_infinity(logit);
    const int64_t until = warp_inclusive_sum(int64_t{token_weight(logit, maximum)});
    const int reached = first_lane(until > left);
    if (reached >= 0) return lane == reached ? i : -2;
    left -= __shfl_sync(0xffffffffu, until, 31);
  }
}

}  // namespace flexvar
