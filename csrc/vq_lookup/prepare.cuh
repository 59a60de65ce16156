// Codes and latents as they are compared. Exact arithmetic: the same bits as on the CPU.
#pragma once

#include "common/ptx.cuh"
#include "resample/weights.h"
#include "vq_lookup/exact_row.cuh"
#include "vq_lookup/workspace.cuh"

namespace flexvar {

// Scales of a pyramid that one launch handles; the launcher goes through more in several.
constexpr int kVqMaxScales = 32;

struct VqScaleSize {
  int64_t first_token;
  int height, width;
};

// Rows of latents: a matrix, or resampled images.
struct VqLatentSource {
  const float* latents;  // [N, C], or [B, C, height, width] with num_scales > 0
  ResampleMode mode;
  int height, width;
  int64_t tokens;  // of one image, all scales together
  int num_scales;
  VqScaleSize scales[kVqMaxScales];  // consecutive ones
  int64_t first_token, end_token;    // that they cover
};

struct VqPrepareParams {
  VqProblem problem;
  VqWorkspace workspace;
  const float* codebook;  // [V, C]
  VqLatentSource source;
  int64_t code_rows;    // padded_codes, or 0 when another launch has prepared them
  int64_t latent_rows;  // of this launch
};

constexpr int kVqPrepareThreads = 256;
constexpr int kVqRowsPerBlock = kVqPrepareThreads / kVqLanesPerRow;

// One latent of a pyramid: a token of an image, resampled to the token's scale.
struct VqResampledLatent {
  const float* first_line;  // of channel 0, from the first column on
  int64_t line, plane;
  ResampleAxis<float> row_axis, column_axis;
  ResampleWindow<float> row_window, column_window;

  __device__ __forceinline__ VqResampledLatent(const VqLatentSource& source, int channels,
                                               int64_t n)
      : line(source.width), plane(static_cast<int64_t>(source.height) * source.width) {
    const int64_t token = n % source.tokens;
    const VqScaleSize* scale = source.scales + source.num_scales - 1;
    while (scale->first_token > token) --scale;
    row_axis = make_resample_axis<float>(source.mode, source.height, scale->height);
    column_axis = make_resample_axis<float>(source.mode, source.width, scale->width);
    row_window = resample_window(row_axis, (token - scale->first_token) / scale->width);
    column_window = resample_window(column_axis, (token - scale->first_token) % scale->width);
    first_line = source.latents + n / source.tokens * channels * plane + row_window.start * line +
                 column_window.start;
  }
  __device__ __forceinline__ float operator()(int channel) const {
    double sum = 0;
    for (int64_t i = 0; i < row_window.count; ++i) {
      const float* pixels = first_line + channel * plane + i * line;
      const float row_weight = resample_weight(row_axis, row_window, i);
      for (int64_t j = 0; j < column_window.count; ++j) {
        // The weight in fp32, so that the product is exact in double.
        const float weight = row_weight * resample_weight(column_axis, column_window, j);
        sum += static_cast<double>(weight) * static_cast<double>(pixels[j]);
      }
    }
    return static_cast<float>(sum);
  }
};

// kPyramid: latents are resampled.
template <bool kPyramid>
__global__ void __launch_bounds__(kVqPrepareThreads, kPyramid ? 2 : 4)
    vq_prepare_kernel(VqPrepareParams params) {
  ptx::griddepcontrol_launch_dependents();
  const VqProblem& problem = params.problem;
  const VqWorkspace& workspace = params.workspace;
  const VqLatentSource& source = params.source;
  const int dim = problem.dim, padded_dim = problem.padded_dim, tensor_dim = problem.tensor_dim;
  const int part = static_cast<int>(threadIdx.x % kVqLanesPerRow);
  const int64_t row = blockIdx.x * static_cast<int64_t>(kVqRowsPerBlock) +
                      static_cast<int>(threadIdx.x / kVqLanesPerRow);
  const bool is_code = row < params.code_rows;
  int64_t n = is_code ? row : row - params.code_rows;
  const bool in_range = is_code || n < params.latent_rows;
  if (kPyramid && !is_code && in_range) {
    // The launch's rows are numbered image by image over the tokens of its scales.
    const int64_t tokens = source.end_token - source.first_token;
    n = n / tokens * source.tokens + source.first_token + n % tokens;
  }
  const bool real = in_range && (!is_code || n < problem.num_codes);
  float* out = (is_code ? workspace.codes : workspace.latents) + n * padded_dim;
  const float* in = (is_code ? params.codebook : source.latents) + n * dim;
  if (kPyramid && !is_code && in_range) {
    const VqResampledLatent latent(source, dim, n);
    for (int c = part; c < dim; c += kVqLanesPerRow) out[c] = latent(c);
    in = out;
  }

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

inline dim3 vq_prepare_grid(int64_t rows) {
  return dim3(static_cast<unsigned>((rows + kVqRowsPerBlock - 1) / kVqRowsPerBlock));
}

}  // namespace flexvar
