// Nearest codes in two passes.
//
// Pass 1 computes the score x·e - |e|²/2 of every pair in fp32 and keeps only the maximum over each
// group of codes. Pass 2 scores, in double precision, the codes of every group whose maximum lies
// within twice the fp32 error bound of the row's maximum (nearly always one group). The exact
// nearest code is in one of these groups, so the result depends neither on the instruction set nor
// on how the work is split.
#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "resample/taps.h"

namespace flexvar {

// Codes are packed in blocks. Within a block code i is in lane i / vectors of vector i % vectors:
// the codes of one lane, which form a group, are neighbours in the codebook.
constexpr int64_t kVqBlockCodes = 256;
constexpr int64_t kVqMaxLanes = 16;
// Queries are stored in multiples of this many rows, each padded to a multiple of 8 components.
constexpr int64_t kVqRowMultiple = 8;

// Token t of a scale, in row-major order, is the latent resampled to that scale at (t / width,
// t % width).
struct VqScale {
  int64_t first_token;
  ResampleTaps<float> rows, columns;
};

struct VqPyramid {
  const VqScale* scales;
  int64_t num_scales;
  int64_t num_tokens;  // of one image, all scales together
};

struct VqLookupParams {
  const float* codebook;     // [V, C]
  const float* latents;      // [N, C], or [B, H * W, C] with a pyramid
  const VqPyramid* pyramid;  // N = B * num_tokens; null: the latents are the rows
  int64_t num_codes, num_latents, dim;
  bool normalize;
  // Made by vq_prepare_codes:
  float* packed_codes;   // [blocks][vectors of a block][C][lanes]
  float* negative_half;  // [blocks * kVqBlockCodes]: -|e|²/2; -inf for padding and non-finite codes
  double* block_norms;   // [blocks]: the largest |e| of a block
  // [blocks * kVqBlockCodes]: factor from codebook row to code; 0 for padding and non-finite codes.
  // Null where pass 2 makes those that it needs, groups of a few codes (cpu_tiles.h): that takes
  // less than to write all of them.
  double* scales;
  // Made by vq_prepare_latents:
  float* queries;       // [N rounded up][padded_dim]
  double* query_norms;  // [N]: |x|; NaN for a row that holds a NaN or an infinity
  // Taken from block_norms by the launcher:
  double max_code_norm;
  // Made by vq_score for the rows [first_row, first_row + rows of the buffer):
  float* group_max;  // [rows][blocks * kVqMaxLanes]
  int64_t first_row;
  int64_t* indices;          // [N]
  bool* codebook_is_finite;  // one, that many threads set to false where a code is not

  int64_t blocks() const { return (num_codes + kVqBlockCodes - 1) / kVqBlockCodes; }
  int64_t padded_dim() const { return (dim + 7) / 8 * 8; }
};

FLEXVAR_DECLARE_CPU_KERNEL(vq_prepare_codes,
                           (const VqLookupParams& params, int64_t block_begin, int64_t block_end));
// Rows, the padding rows included.
FLEXVAR_DECLARE_CPU_KERNEL(vq_prepare_latents,
                           (const VqLookupParams& params, int64_t row_begin, int64_t row_end));
// Pass 1; row_begin and row_end are multiples of kVqRowMultiple.
FLEXVAR_DECLARE_CPU_KERNEL(vq_score, (const VqLookupParams& params, int64_t row_begin,
                                      int64_t row_end, int64_t block_begin, int64_t block_end));
// Pass 2.
FLEXVAR_DECLARE_CPU_KERNEL(vq_resolve,
                           (const VqLookupParams& params, int64_t row_begin, int64_t row_end));

}  // namespace flexvar
