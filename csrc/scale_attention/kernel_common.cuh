// What the CUDA kernels of attention take.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/fast_divisor.h"
#include "common/inverse_length.h"
#include "common/ptx.cuh"
#include "common/tensor_map.h"
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
template <class Tile>
constexpr int kTilesPerLaunch = 3072 / sizeof(Tile);
template <class Tile>
struct TileList {
  Tile tiles[kTilesPerLaunch<Tile>];
  FastDivisor count;
};

// What a block works on. The tiles of a head are neighbours in the grid: they run side by side, and
// all but the first find its keys and values in the L2 cache.
template <class Tile>
__device__ __forceinline__ const Tile& tile_of_block(const TileList<Tile>& list,
                                                     unsigned block = blockIdx.x) {
  return list.tiles[list.count.remainder(block)];
}
template <class Tile>
__device__ __forceinline__ int64_t head_of_block(const TileList<Tile>& list,
                                                 unsigned block = blockIdx.x) {
  return list.count.quotient(block);
}

// A row's softmax over a part of the keys.
template <class A>
struct AttentionPart {
  A maximum;  // of scores in base 2
  A sum;      // of the weights, relative to that
};

constexpr double kAttentionLog2E = 1.4426950408889634074;
constexpr double kAttentionLn2 = 0.69314718055994530942;

// Boxes of 64 tokens of a head, for the copy engine. Only where kernels use it.
struct AttentionMaps {
  TensorMap q, k, v;
};
struct AttentionBackwardMaps {
  TensorMap q, k, v, grad_out;
};

// The grid of every kernel is (B * H heads times tiles), of the forward pass with parts in its
// third dimension; A is the type of the arithmetic, float or (for double) double.
struct AttentionForwardCuda {
  AttentionMaps maps;
  AttentionCudaTensor q, k, v;
  void* out;        // [B, L, H, D], contiguous
  void* logsumexp;  // A [B, H, L], or null
  FastDivisor heads;
  int64_t query_count;
  double softmax_scale;
  const void* q_scale = nullptr;  // A [H]: q and k are normalised and q multiplied by this; or null
  // With q_scale, A [B, H, L] each: what q and k were multiplied by to have length 1.
  void *q_inverse_lengths = nullptr, *k_inverse_lengths = nullptr;
  // Without q_scale, A [H]: no logit of the head is further from 0 than this; or null.
  const void* logit_bound = nullptr;
  // Blocks z take keys_per_part keys each. What they find goes to `out`, or, for attention_combine,
  // as weighted sums to A [parts, B, H, L, D] and AttentionPart<A> [parts, B, H, L].
  int keys_per_part = INT32_MAX;
  void *part_sums = nullptr, *parts = nullptr;
  // From products of rows to scores in base 2, but for q_scale.
  float float_scale = static_cast<float>(softmax_scale * kAttentionLog2E);
};

struct AttentionBackwardCuda {
  AttentionBackwardMaps maps;
  AttentionCudaTensor q, k, v, out, grad_out;
  const void* logsumexp;           // A [B, H, L]
  void* delta;                     // A [B, H, L]: sum over D of grad_out * out
  void* logsumexp_in_base_2;       // float [B, H, L], for kernels on tensor cores; or null
  void *grad_q, *grad_k, *grad_v;  // [B, L, H, D], contiguous
  FastDivisor heads;
  int64_t query_count;  // = key count
  double softmax_scale;
  // As in the forward pass.
  const void *q_scale, *q_inverse_lengths, *k_inverse_lengths;
  void* grad_q_scale_parts;  // A [B, H, L]: every query's part of the gradient of q_scale
};

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

// Of the B * H heads. A launch has fewer than 2^31 blocks, so 32 bits hold them.
__device__ __forceinline__ int64_t image_of(int64_t head, const FastDivisor& heads) {
  return heads.quotient(static_cast<unsigned>(head));
}
__device__ __forceinline__ int64_t head_in_image(int64_t head, const FastDivisor& heads) {
  return heads.remainder(static_cast<unsigned>(head));
}

// The first token of a head; token t follows at t * token_stride.
template <class T>
__device__ __forceinline__ const T* head_of_image(const AttentionCudaTensor& tensor, int64_t image,
                                                  int64_t head_in_image) {
  return static_cast<const T*>(tensor.data) + image * tensor.batch_stride +
         head_in_image * tensor.head_stride;
}
template <class T>
__device__ __forceinline__ const T* head_of(const AttentionCudaTensor& tensor, int64_t head,
                                            const FastDivisor& heads) {
  return head_of_image<T>(tensor, image_of(head, heads), head_in_image(head, heads));
}

// The head's q_scale, 1 where there is none.
template <class A>
__device__ __forceinline__ A q_scale_of(const void* q_scale, int64_t head,
                                        const FastDivisor& heads) {
  return q_scale == nullptr ? A(1) : static_cast<const A*>(q_scale)[head_in_image(head, heads)];
}

// Scores in base 2 that stay within a bound on either side of 0 need no running maximum: with
// bound - kWeightHeadroom in its place, weights lie between 2^kWeightHeadroom and
// 2^(kWeightHeadroom - 2 * bound). That must be a normal number of the type that weights are
// multiplied in: __half's exponents go from -14 to 15; of the others' 24 are left over, so that
// products of small weights and small values are normal numbers, too.
template <class T>
constexpr int kWeightHeadroom = std::is_same_v<T, __half> ? 15 : 0;
template <class T>
constexpr int kWeightExponents = std::is_same_v<T, __half>   ? 15 + 14
                                 : std::is_same_v<T, double> ? 1022 - 24
                                                             : 126 - 24;

// A head's softmax. `maximum` is what scores in base 2 are taken relative to: fixed, or -inf, from
// where the running maximum starts.
template <class A>
struct SoftmaxStart {
  bool fixed;
  A maximum;
};
// `scale`: from products of rows to scores in base 2.
template <class T, class A = AttentionArithmetic<T>>
__device__ __forceinline__ SoftmaxStart<A> start_softmax(const AttentionForwardCuda& params,
                                                         int64_t head, A scale) {
  A bound = A(INFINITY);  // of scores in base 2. Normalised rows' products are at most 1.
  if (params.q_scale != nullptr) {
    bound = scale < 0 ? -scale : scale;
  } else if (params.logit_bound != nullptr) {
    bound = static_cast<const A*>(params.logit_bound)[head_in_image(head, params.heads)] *
            A(kAttentionLog2E);
  }
  if (2 * bound <= kWeightExponents<T>) return {true, bound - kWeightHeadroom<T>};
  return {false, A(-INFINITY)};  // also for a NaN
}

// The block's keys.
struct KeyRange {
  int begin, end;
};
__device__ __forceinline__ KeyRange keys_of_block(const AttentionForwardCuda& params,
                                                  const QueryTile& tile) {
  const int begin = static_cast<int>(blockIdx.z) * params.keys_per_part;
  const int rest = tile.key_end - begin;
  return {begin, begin + (rest < params.keys_per_part ? rest : params.keys_per_part)};
}

// How many of the tile's keys, its last ones, query query_begin + row does not see.
__device__ __forceinline__ int hidden_keys(const QueryTile& tile, int row) {
  const int seen = __ffsll(static_cast<long long>(tile.scale_ends >> row));  // from its own key on
  return seen == 0 ? 0 : tile.query_end - (tile.query_begin + row + seen);
}

// The first query that sees key key_begin + row of the tile; with row 63, that sees all of its
// keys.
__device__ __forceinline__ int first_query(const KeyTile& tile, int row) {
  const uint64_t ends = tile.scale_ends & ((uint64_t{1} << row) - 1);  // of scales before
  return ends == 0 ? tile.query_begin : tile.key_begin + 64 - __clzll(static_cast<long long>(ends));
}

// A row of this block's part in [parts, B, H, L].
__device__ __forceinline__ int64_t part_row(const AttentionForwardCuda& params,
                                            const TileList<QueryTile>& list, int64_t head,
                                            int64_t token) {
  const int64_t heads = list.count.quotient(gridDim.x);
  return (blockIdx.z * heads + head) * params.query_count + token;
}

// The head's part of A [B, H, L], or null.
template <class A>
__device__ __forceinline__ const A* head_part(const void* data, int64_t head, int64_t tokens) {
  return data == nullptr ? nullptr : static_cast<const A*>(data) + head * tokens;
}
template <class A>
__device__ __forceinline__ A* head_part(void* data, int64_t head, int64_t tokens) {
  return data == nullptr ? nullptr : static_cast<A*>(data) + head * tokens;
}

// Whether a row that was multiplied by this has length 1 now. The gradient of the others, as that
// of F.normalize, knows only the factor.
template <class A>
__device__ __forceinline__ bool has_length_one(A inverse) {
  return inverse < inverse_length(A(0));
}

// Offset of token `token` of a head in a contiguous [B, tokens, H, kDim].
template <int kDim>
__device__ __forceinline__ int64_t contiguous_offset(int64_t head, const FastDivisor& heads,
                                                     int64_t tokens, int64_t token) {
  return ((image_of(head, heads) * tokens + token) * heads.divisor + head_in_image(head, heads)) *
         kDim;
}

}  // namespace flexvar
