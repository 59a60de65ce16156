// What the CUDA kernels of attention take.
#pragma once

#include "common/cuda.cuh"
#include "common/ptx.cuh"
#include "scale_attention/tile.h"

namespace flexvar {

// [B, L, H, D] with contiguous rows of D elements; strides in elements.
struct AttentionCudaTensor {
  const void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// A part of the work list, handed to a kernel by value: nothing to allocate or copy before a
// launch.
constexpr int kTilesPerLaunch = 256;
template <class Tile>
struct TileList {
  Tile tiles[kTilesPerLaunch];
};

// The grid of every kernel is (B * H heads, tiles); A is the type of the arithmetic, float or (for
// double) double.
struct AttentionForwardCuda {
  AttentionCudaTensor q, k, v;
  void* out;        // [B, L, H, D], contiguous
  void* logsumexp;  // A [B, H, L], or null
  int64_t heads;
  int64_t query_count;
  double softmax_scale;
};

struct AttentionBackwardCuda {
  AttentionCudaTensor q, k, v, out, grad_out;
  const void* logsumexp;           // A [B, H, L]
  void* delta;                     // A [B, H, L]: sum over D of grad_out * out
  void *grad_q, *grad_k, *grad_v;  // [B, L, H, D], contiguous
  int64_t heads;
  int64_t query_count;  // = key count
  double softmax_scale;
};

constexpr double kAttentionLog2E = 1.4426950408889634074;
constexpr double kAttentionLn2 = 0.69314718055994530942;

template <class T>
struct AttentionArithmeticOf {
  using type = float;
};
template <>
struct AttentionArithmeticOf<double> {
  using type = double;
};
template <class T>
using AttentionArithmetic = typename AttentionArithmeticOf<T>::type;

// The first token of a head; token t follows at t * token_stride.
template <class T>
__device__ __forceinline__ const T* head_of(const AttentionCudaTensor& tensor, int64_t head,
                                            int64_t heads) {
  return static_cast<const T*>(tensor.data) + head / heads * tensor.batch_stride +
         head % heads * tensor.head_stride;
}

// Offset of token `token` of a head in a contiguous [B, tokens, H, kDim].
template <int kDim>
__device__ __forceinline__ int64_t contiguous_offset(int64_t head, int64_t heads, int64_t tokens,
                                                     int64_t token) {
  return ((head / heads * tokens + token) * heads + head % heads) * kDim;
}

}  // namespace flexvar
