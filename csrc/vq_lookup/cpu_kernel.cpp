#include "vq_lookup/cpu_kernel.h"

namespace flexvar::FLEXVAR_ISA {

void vq_lookup_rows(const VqLookupParams& params, int64_t begin, int64_t end) {
  const int64_t dim = params.dim;
  for (int64_t n = begin; n < end; ++n) {
    const float* x = params.latents + n * dim;
    int64_t best = 0;
    float best_score = __builtin_inff();
    for (int64_t v = 0; v < params.num_codes; ++v) {
      const float* e = params.codebook + v * dim;
      float dot = 0;
      for (int64_t c = 0; c < dim; ++c) dot += x[c] * e[c];
      const float score = params.half_squared_norms[v] - dot;
      if (score < best_score) {
        best_score = score;
        best = v;
      }
    }
    params.indices[n] = best;
  }
}

}  // namespace flexvar::FLEXVAR_ISA
