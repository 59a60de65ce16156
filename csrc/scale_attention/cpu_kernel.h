#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"

namespace flexvar {

struct QueryTile;

enum class AttentionElement { float32, float16, bfloat16, float64 };

// [B, L, H, D] with contiguous rows of D elements; strides in elements.
struct AttentionTensor {
  const void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};

struct AttentionShape {
  AttentionElement element;
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

// `scratch`: 64-byte aligned, as many bytes as cpu.cpp works out from the shape.
// Work items [begin, end); item i is tile i % tile_count of head i / tile_count (batch-major).
FLEXVAR_DECLARE_CPU_KERNEL(attention_forward, (const AttentionForwardParams& params, int64_t begin,
                                               int64_t end, void* scratch));
// Heads [begin, end), batch-major.
FLEXVAR_DECLARE_CPU_KERNEL(attention_backward, (const AttentionBackwardParams& params,
                                                int64_t begin, int64_t end, void* scratch));

}  // namespace flexvar
