// guided_sample on CUDA: one block samples one row. It reads it from memory once, into registers,
// and draws from the candidates that reach a pivot. Rows that this does not suit (longer than the
// registers hold, nothing to cut, too many candidates or a crowded bin) are bisected in memory.
#pragma once

#include "guided_sample/bisection.cuh"
#include "guided_sample/candidates.cuh"

namespace flexvar {

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
