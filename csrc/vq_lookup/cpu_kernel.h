#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"

namespace flexvar {

struct VqLookupParams {
  const float* latents;             // [N, C], as prepared by the launcher (normalised if asked for)
  const float* codebook;            // [V, C], likewise
  const float* half_squared_norms;  // [V]: |e|^2 / 2
  int64_t* indices;                 // [N]
  int64_t num_codes;
  int64_t dim;
};

FLEXVAR_DECLARE_CPU_KERNEL(vq_lookup_rows,
                           (const VqLookupParams& params, int64_t begin, int64_t end));

}  // namespace flexvar
