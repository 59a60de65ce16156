#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "common/float_element.h"

namespace flexvar {

struct GuidedSampleParams {
  const void* logits;  // [B * l, V]
  FloatElement element;
  const int64_t* seeds;      // [B]
  const int64_t* image_ids;  // [B]
  int64_t* tokens;           // [B * l]
  int64_t length;            // l
  int64_t vocabulary;        // V
  int64_t top_k;             // 0: off
  double top_p;              // 0: off
  int64_t step;
};

// 32-bit words of scratch that one call needs.
inline int64_t guided_sample_scratch(int64_t vocabulary) { return 5 * (vocabulary + 16); }

FLEXVAR_DECLARE_CPU_KERNEL(guided_sample_rows, (const GuidedSampleParams& params, int64_t begin,
                                                int64_t end, int32_t* scratch));

}  // namespace flexvar
