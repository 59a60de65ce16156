// append_qkv on CUDA: 8 lanes own a vector of a head, so that 4 elements at a time of each make
// whole sectors of memory. Reads and writes every element once: 2 x 3 x B x l x width elements.
#pragma once

#include "common/cuda.cuh"
#include "common/inverse_length.h"
#include "common/ptx.cuh"

namespace flexvar {

constexpr int kAppendThreads = 256, kAppendLanes = 8, kAppendChunk = 4;
constexpr int kAppendVectors = kAppendThreads / kAppendLanes;  // of a block

template <class From, class To, class Real>
struct AppendQkvCudaParams {
  const From* qkv;      // [B, tokens, 3, heads, dim], contiguous
  const Real* q_scale;  // [heads], or null: nothing is normalised
  To* q;                // [B, tokens, heads, dim], contiguous
  To* k;                // the first image's first new token in the cache
  To* v;
  unsigned vectors;  // B * tokens * 3 * heads
  unsigned tokens, heads;
  int64_t k_image_stride, k_token_stride;  // elements; a token's heads are contiguous
  int64_t v_image_stride, v_token_stride;
  bool aligned;  // every pointer and stride allows to move 4 elements at once
};

template <class T>
struct alignas(kAppendChunk * sizeof(T)) AppendChunk {
  T x[kAppendChunk];
};

template <class Real, class T>
__device__ __forceinline__ Real append_load(T x) {
  if constexpr (sizeof(Real) == 8) {
    return x;
  } else {
    return to_float(x);
  }
}
template <class T, class Real>
__device__ __forceinline__ T append_store(Real x) {
  if constexpr (sizeof(Real) == 8) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

// All lanes of a warp take part in the shuffles; those beyond the last vector read nothing.
template <class From, class To, class Real, int kDim>
__global__ void __launch_bounds__(kAppendThreads)
    append_qkv_kernel(AppendQkvCudaParams<From, To, Real> params) {
  constexpr int kChunks = kDim / (kAppendLanes * kAppendChunk);
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const unsigned vector = blockIdx.x * kAppendVectors + threadIdx.x / kAppendLanes;
  const int lane = static_cast<int>(threadIdx.x) % kAppendLanes;
  const bool valid = vector < params.vectors;
  // On its way before the divisions that say where it goes.
  AppendChunk<From> chunks[kChunks] = {};
  if (valid) {
    const From* from = params.qkv + int64_t{vector} * kDim;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = (c * kAppendLanes + lane) * kAppendChunk;
      if (params.aligned) {
        chunks[c] = *reinterpret_cast<const AppendChunk<From>*>(from + d);
      } else {
#pragma unroll
        for (int i = 0; i < kAppendChunk; ++i) chunks[c].x[i] = from[d + i];
      }
    }
  }
  const unsigned head = vector % params.heads, slice = vector / params.heads;
  const unsigned part = slice % 3, token = slice / 3;
  const unsigned image = token / params.tokens, n = token % params.tokens;
  const bool normalize = params.q_scale != nullptr && part < 2;
  const Real scale = valid && normalize && part == 0 ? params.q_scale[head] : Real(1);

  Real x[kChunks][kAppendChunk];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kAppendChunk; ++i) x[c][i] = append_load<Real>(chunks[c].x[i]);
  }
  Real squares = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kAppendChunk; ++i) squares += x[c][i] * x[c][i];
  }
#pragma unroll
  for (int step = 1; step < kAppendLanes; step *= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, step);
  }
  if (!valid) return;
  const Real factor =
      normalize ? inverse_length(static_cast<Real>(sqrt(squares))) * scale : Real(1);
  To* to;
  if (part == 0) {
    to = params.q + (int64_t{token} * params.heads + head) * kDim;
  } else if (part == 1) {
    to = params.k + image * params.k_image_stride + n * params.k_token_stride + head * kDim;
  } else {
    to = params.v + image * params.v_image_stride + n * params.v_token_stride + head * kDim;
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int d = (c * kAppendLanes + lane) * kAppendChunk;
    AppendChunk<To> chunk;
#pragma unroll
    for (int i = 0; i < kAppendChunk; ++i) chunk.x[i] = append_store<To>(x[c][i] * factor);
    if (params.aligned) {
      *reinterpret_cast<AppendChunk<To>*>(to + d) = chunk;
    } else {
#pragma unroll
      for (int i = 0; i < kAppendChunk; ++i) to[d + i] = chunk.x[i];
    }
  }
}

}  // namespace flexvar
