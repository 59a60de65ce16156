#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "common/float_element.h"

namespace flexvar {

struct QueryTile;

// [B, L, H, D] with contiguous rows of D elements; strides in elements.
struct AttentionTensor {
  const void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};

struct AttentionShape {
  Element element;
  int64_t heads;
  int64_t query_count;  // L of the queries
  int64_t key_count;    // of the keys that are attended to
  int64_t dim;          // a multiple of 32
  double softmax_scale;
  const QueryTile* tiles;  // of at most kAttentionTileQueries queries, in order of their queries
  int64_t tile_count;
};
constexpr int64_t kAttentionTileQueries = 64;
constexpr int64_t kAttentionKeyBlock = 64;

struct AttentionForwardParams {
  AttentionShape shape;
  AttentionTensor q, k, v;
  void* out;  // [B, L, H, D], contiguous
  void*
      logsumexp;  // [B, H, L] in the type of the arithmetic (float, or double for float64), or null
};

struct AttentionBackwardParams {
  AttentionShape shape;
  AttentionTensor q, k, v, out, grad_out;
  const void* logsumexp;           // as in the forward pass
  void *grad_q, *grad_k, *grad_v;  // [B, L, H, D], contiguous
};

// Rows of D elements scaled to length 1, and multiplied by their head's scale.
struct AttentionNormalizeParams {
  Element element;
  int64_t tokens, heads, dim;
  AttentionTensor x;
  const void* scale;      // [H] in the type of the arithmetic, or null
  void* inverse_lengths;  // [B, H, L] in the type of the arithmetic
  bool measured;          // inverse_lengths are there, rather than to be written
  void* out;              // [B, L, H, D], contiguous
};

struct AttentionNormalizeBackwardParams {
  Element element;
  int64_t tokens, heads, dim;
  AttentionTensor x;
  const void* scale;
  const void* inverse_lengths;
  void* grad;         // [B, L, H, D], contiguous: that of `out` becomes that of `x`
  void* scale_parts;  // [B, H, L]: every row's part of the gradient of `scale`; or null
};

// `scratch`: 64-byte aligned, as many bytes as cpu.cpp works out from the shape.
// Work items [begin, end); item i is tile i % tile_count of head i / tile_count (batch-major).
FLEXVAR_DECLARE_CPU_KERNEL(attention_forward, (const AttentionForwardParams& params, int64_t begin,
                                               int64_t end, void* scratch));
// Heads [begin, end), batch-major.
FLEXVAR_DECLARE_CPU_KERNEL(attention_backward, (const AttentionBackwardParams& params,
                                                int64_t begin, int64_t end, void* scratch));
// Tokens [begin, end), counted through all images.
FLEXVAR_DECLARE_CPU_KERNEL(attention_normalize,
                           (const AttentionNormalizeParams& params, int64_t begin, int64_t end));
FLEXVAR_DECLARE_CPU_KERNEL(attention_normalize_backward,
                           (const AttentionNormalizeBackwardParams& params, int64_t begin,
                            int64_t end));

}  // namespace flexvar
