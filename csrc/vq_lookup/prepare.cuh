// Codes and latents as they are compared. Exact arithmetic: the same bits as on the CPU.
#pragma once

#include "common/ptx.cuh"
#include "resample/weights.h"
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

// Eight threads share a row; thread j holds components j, j + 8, …. The sum over the threads is
// ((0+4)+(2+6)) + ((1+5)+(3+7)).
constexpr int kVqPrepareThreads = 256;
constexpr int kVqThreadsPerRow = 8;
constexpr int kVqRowsPerBlock = kVqPrepareThreads / kVqThreadsPerRow;

__device__ __forceinline__ double vq_sum_of_row(double partial) {
  partial += __shfl_xor_sync(0xffffffffu, partial, 4);
  partial += __shfl_xor_sync(0xffffffffu, partial, 2);
  return partial + __shfl_xor_sync(0xffffffffu, partial, 1);
}

__device__ __forceinline__ float vq_resampled(const VqLatentSource& source, int64_t image,
                                              int64_t token, int channel, int channels) {
  const VqScaleSize* scale = source.scales + source.num_scales - 1;
  while (scale->first_token > token) --scale;
  const int64_t y = (token - scale->first_token) / scale->width;
  const int64_t x = (token - scale->first_token) % scale->width;
  const auto rows = make_resample_axis<float>(source.mode, source.height, scale->height);
  const auto columns = make_resample_axis<float>(source.mode, source.width, scale->width);
  const auto row_window = resample_window(rows, y);
  const auto column_window = resample_window(columns, x);
  const float* plane = source.latents + (image * channels + channel) * source.height * source.width;
  double sum = 0;
  for (int64_t i = 0; i < row_window.count; ++i) {
    const float* line = plane + (row_window.start + i) * source.width + column_window.start;
    const float row_weight = resample_weight(rows, row_window, i);
    for (int64_t j = 0; j < column_window.count; ++j) {
      // The weight in fp32, so that the product is exact in double.
      const float weight = row_weight * resample_weight(columns, column_window, j);
      sum += static_cast<double>(weight) * static_cast<double>(line[j]);
    }
  }
  return static_cast<float>(sum);
}

// Component c of latent `n` (of N). For a pyramid, the launch's rows are numbered image by image
// over the tokens of its scales.
__device__ __forceinline__ float vq_component(const VqPrepareParams& params, bool is_code,
                                              int64_t n, int c) {
  const int dim = params.problem.dim;
  if (is_code) return params.codebook[n * dim + c];
  const VqLatentSource& source = params.source;
  if (source.num_scales == 0) return source.latents[n * dim + c];
  return vq_resampled(source, n / source.tokens, n % source.tokens, c, dim);
}

__global__ void __launch_bounds__(kVqPrepareThreads) vq_prepare_kernel(VqPrepareParams params) {
  ptx::griddepcontrol_launch_dependents();
  const VqProblem& problem = params.problem;
  const VqWorkspace& workspace = params.workspace;
  const int part = static_cast<int>(threadIdx.x) % kVqThreadsPerRow;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kVqRowsPerBlock) +
                      static_cast<int>(threadIdx.x) / kVqThreadsPerRow;
  const bool is_code = row < params.code_rows;
  int64_t n = is_code ? row : row - params.code_rows;
  const bool in_range = is_code || n < params.latent_rows;
  if (!is_code && in_range && params.source.num_scales > 0) {
    const int64_t tokens = params.source.end_token - params.source.first_token;
    n = n / tokens * params.source.tokens + params.source.first_token + n % tokens;
  }
  const bool real = in_range && (!is_code || n < problem.num_codes);
  float* out = (is_code ? workspace.codes : workspace.latents) + n * problem.padded_dim;

  double squares = 0;
  for (int c = part; c < problem.padded_dim; c += kVqThreadsPerRow) {
    const float value = real && c < problem.dim ? vq_component(params, is_code, n, c) : 0.0f;
    if (in_range) out[c] = value;
    squares += static_cast<double>(value) * static_cast<double>(value);
  }
  squares = vq_sum_of_row(squares);
  // A sum of squares of finite floats does not overflow in double.
  const bool valid = real && squares < static_cast<double>(INFINITY);
  const double norm = sqrt(squares);
  const double scale = problem.normalize ? 1.0 / (norm > 1e-12 ? norm : 1e-12) : 1.0;

  squares = 0;
  for (int c = part; in_range && c < problem.padded_dim; c += kVqThreadsPerRow) {
    const float value = valid ? static_cast<float>(static_cast<double>(out[c]) * scale) : 0.0f;
    out[c] = value;
    squares += static_cast<double>(value) * static_cast<double>(value);
  }
  squares = vq_sum_of_row(squares);
  if (!in_range) return;
  if (problem.tensor_dim > 0) {
    __half* half_out =
        (is_code ? workspace.codes_half : workspace.latents_half) + n * problem.tensor_dim;
    for (int c = part; c < problem.tensor_dim; c += kVqThreadsPerRow) {
      half_out[c] = __float2half_rn(c < problem.padded_dim ? out[c] : 0.0f);
    }
  }
  if (part != 0) return;
  if (!is_code) {
    workspace.latent_norms[n] = valid ? sqrt(squares) : static_cast<double>(NAN);
    return;
  }
  workspace.half_norms[n] = valid ? 0.5 * squares : static_cast<double>(INFINITY);
  workspace.negative_half[n] = valid ? static_cast<float>(-0.5 * squares) : kVqAbsentScore;
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
