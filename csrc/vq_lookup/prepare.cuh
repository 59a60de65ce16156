// Codes and latents as they are compared. Exact arithmetic: the same bits as on the CPU.
#pragma once

#include "common/ptx.cuh"
#include "vq_lookup/exact_row.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

struct VqPrepareParams {
  VqProblem problem;
  VqWorkspace workspace;
  const float* codebook;  // [V, C]
  const float* latents;   // [N, C]
};

constexpr int kVqPrepareThreads = 256;
constexpr int kVqRowsPerBlock = kVqPrepareThreads / kVqLanesPerRow;

// Latents may be those of the kernel before, the codebook not.
__global__ void __launch_bounds__(kVqPrepareThreads, 4) vq_prepare_kernel(VqPrepareParams params) {
  ptx::griddepcontrol_launch_dependents();
  const VqProblem& problem = params.problem;
  const VqWorkspace& workspace = params.workspace;
  const int dim = problem.dim, padded_dim = problem.padded_dim, tensor_dim = problem.tensor_dim;
  const int part = static_cast<int>(threadIdx.x % kVqLanesPerRow);
  const int64_t row = blockIdx.x * static_cast<int64_t>(kVqRowsPerBlock) +
                      static_cast<int>(threadIdx.x / kVqLanesPerRow);
  const int64_t code_rows = problem.padded_codes();
  const bool is_code = row < code_rows;
  const int64_t n = is_code ? row : row - code_rows;
  const bool in_range = is_code || n < problem.num_latents;
  const bool real = in_range && (!is_code || n < problem.num_codes);
  float* out = (is_code ? workspace.codes : workspace.latents) + n * padded_dim;
  const float* in = (is_code ? params.codebook : params.latents) + n * dim;
  if (!is_code) ptx::griddepcontrol_wait();

  // A thread holds its first components in registers and reads the others twice.
  constexpr int kHeld = 8;
  constexpr int kHeldComponents = kHeld * kVqLanesPerRow;
  static_assert(kHeldComponents >= kVqMaxTensorSteps * 16);
  const auto component = [&](int c) { return real && c < dim ? in[c] : 0.0f; };
  double squares = 0;
  const auto add_square = [&](float value) {
    squares += static_cast<double>(value) * static_cast<double>(value);
  };
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = component(part + i * kVqLanesPerRow);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * kVqLanesPerRow < dim) add_square(held[i]);
  }
  for (int c = part + kHeldComponents; c < dim; c += kVqLanesPerRow) add_square(component(c));
  squares = vq_sum_of_row(squares);
  const bool valid = real && vq_is_finite(squares);
  const double scale = problem.normalize ? vq_scale(squares) : 1.0;

  // The length of a normalised latent is not asked for.
  const bool measured = !problem.normalize || __any_sync(0xffffffffu, is_code);
  squares = 0;
  __half* half_out = (is_code ? workspace.codes_half : workspace.latents_half) + n * tensor_dim;
  const auto write = [&](int c, float unscaled) {
    const float value = valid ? vq_scaled(unscaled, scale) : 0.0f;
    if (measured) add_square(value);
    if (in_range && c < padded_dim) out[c] = value;
    if (in_range && c < tensor_dim) half_out[c] = __float2half_rn(value);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int first = i * kVqLanesPerRow;
    if (first < padded_dim || first < tensor_dim) write(part + first, held[i]);
  }
  for (int c = part + kHeldComponents; c < padded_dim; c += kVqLanesPerRow) {
    write(c, component(c));
  }
  if (measured) squares = vq_sum_of_row(squares);
  if (!in_range || part != 0) return;
  if (!is_code) {
    const double norm = problem.normalize ? 1.0 : sqrt(squares);
    workspace.latent_norms[n] = valid ? norm : static_cast<double>(NAN);
    return;
  }
  workspace.half_norms[n] = valid ? 0.5 * squares : static_cast<double>(INFINITY);
  float* start = workspace.start_of(n);
  start[0] = start[2] = valid ? static_cast<float>(-0.5 * squares) : kVqAbsentScore;
  if (valid && !problem.normalize) {
    // Norms are not negative, so their bits order as integers; one step up for the rounding.
    const int bits = __float_as_int(static_cast<float>(sqrt(squares))) + 1;
    atomicMax(reinterpret_cast<int*>(workspace.max_code_norm), bits);
  }
}

inline int64_t vq_prepare_blocks(const VqProblem& problem) {
  return divide_up(problem.padded_codes() + problem.num_latents, kVqRowsPerBlock);
}

}  // namespace flexvar
