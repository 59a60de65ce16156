#pragma once

#include "scale_attention/cpu_kernel.h"

namespace flexvar::amx {

// attention_forward for bfloat16 on CPUs with a tile unit.
void attention_forward_bfloat16(const AttentionForwardParams& params, int64_t begin, int64_t end,
                                void* scratch);

}  // namespace flexvar::amx
