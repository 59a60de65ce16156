// Nearest code by Euclidean distance. Raw pointers only: this source also runs on the CPU in the
// tests.
#pragma once

#include <cstdint>

namespace flexvar {

struct VqLookupCudaParams {
  const float* latents;   // [N, C]
  const float* codebook;  // [V, C]
  int64_t* indices;       // [N]
  int64_t num_latents;
  int64_t num_codes;
  int64_t dim;
};

__global__ void vq_lookup_kernel(VqLookupCudaParams params) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (n >= params.num_latents) return;
  float best_score = INFINITY;
  int64_t best = 0;
  for (int64_t v = 0; v < params.num_codes; ++v) {
    float dot = 0, squared = 0;
    for (int64_t c = 0; c < params.dim; ++c) {
      const float e = params.codebook[v * params.dim + c];
      dot += e * params.latents[n * params.dim + c];
      squared += e * e;
    }
    const float score = 0.5f * squared - dot;
    if (score < best_score) {
      best_score = score;
      best = v;
    }
  }
  params.indices[n] = best;
}

}  // namespace flexvar
