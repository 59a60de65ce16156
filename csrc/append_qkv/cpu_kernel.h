#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "common/float_element.h"

namespace flexvar {

struct AppendQkvParams {
  const void* qkv;      // [B, tokens, 3, heads, dim], contiguous
  const void* q_scale;  // [heads] in the arithmetic's type, or null: nothing is normalised
  void* q;              // [B, tokens, heads, dim], contiguous
  void* k;              // the first image's first new token in the cache
  void* v;
  Element from, to;  // of qkv; of q, k and v
  int64_t tokens, heads, dim;
  int64_t k_image_stride, k_token_stride;  // elements; a token's heads are contiguous
  int64_t v_image_stride, v_token_stride;
};

// Tokens [begin, end), counted through all images.
FLEXVAR_DECLARE_CPU_KERNEL(append_qkv_tokens,
                           (const AppendQkvParams& params, int64_t begin, int64_t end));

}  // namespace flexvar
