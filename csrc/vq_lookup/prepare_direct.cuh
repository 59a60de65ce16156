// Many codes and latents as the tensor cores compare them, normalised in fp32.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/direct_row.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

constexpr int kVqPrepareDirectThreads = 256;
constexpr int kVqPrepareDirectRows = kVqPrepareDirectThreads / 4;

struct VqPrepareDirectParams {
  VqWorkspace workspace;
  VqDirectRows latents, codes;
  int padded_codes;  // come first
};

template <int kSteps>
__global__ void __launch_bounds__(kVqPrepareDirectThreads, 4)
    vq_prepare_direct_kernel(VqPrepareDirectParams params) {
  ptx::griddepcontrol_launch_dependents();
  const VqWorkspace& workspace = params.workspace;
  int n = static_cast<int>(blockIdx.x * kVqPrepareDirectRows + threadIdx.x / 4);
  const bool is_code = n < params.padded_codes;
  if (!is_code) n -= params.padded_codes;
  const VqDirectRows rows = is_code ? params.codes : params.latents;
  VqQuarterRow<kSteps> row(rows, n);
  const bool exists = n < rows.count;
  const float squares = vq_normalize(row, exists);
  if (!is_code && !exists) return;
  __half* halves = is_code ? workspace.codes_half : workspace.latents_half;
  vq_store_half(halves + static_cast<int64_t>(n) * (kSteps * 16), row);
  if (threadIdx.x % 4 != 0) return;
  if (is_code) {
    float* start = workspace.start_of(n);
    start[0] = start[2] = vq_start(squares, exists);
  } else {
    workspace.latent_norms[n] = isnan(squares) ? static_cast<double>(NAN) : kVqUnitNorm;
  }
}

}  // namespace flexvar
