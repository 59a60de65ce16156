#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "common/float_element.h"
#include "resample/taps.h"

namespace flexvar {

template <typename Real>
struct EmbedResampleParams {
  const int64_t* indices;  // [B, y.in_size, x.in_size]
  const void* codebook;    // [num_codes, dim]
  void* tokens;            // [B, y.out_size * x.out_size, dim]
  Element element;         // of codebook and tokens
  int64_t num_codes;
  int64_t dim;
  bool normalize;
  ResampleTaps<Real> y, x;
};

// The adjoint of the resampling: token gradients to gradients of the gathered (normalised) codes.
template <typename Real>
struct EmbedAdjointParams {
  const void* grad_tokens;  // [B, y.in_size * x.in_size, dim]
  Real* grad_grid;          // [B, y.out_size, x.out_size, dim]
  Element element;          // of grad_tokens
  int64_t batch;
  int64_t dim;
  ResampleTaps<Real> y, x;  // transposed
};

// The sum over the cells of each code, through the normalisation.
template <typename Real>
struct EmbedScatterParams {
  const Real* grad_grid;  // [cells, dim]
  const int64_t* cells;   // cells, ordered by code and then by position
  const int64_t* first;   // [num_codes + 1]: code v has cells[first[v]] … cells[first[v + 1] - 1]
  const void* codebook;   // [num_codes, dim]
  void* grad_codebook;    // [num_codes, dim]
  Element element;        // of both
  int64_t dim;
  bool normalize;
};

// Vectors may be written up to this many elements behind the end of a scratch buffer's data.
constexpr int64_t kEmbedScratchPadding = 16;

// Token rows [begin, end) of the batch's B * y.out_size. `scratch` holds (y.in_size + 1) *
// x.in_size * dim + 2 * kEmbedScratchPadding elements. `invalid` is set to the position of the
// first index outside [0, num_codes), if there is one, and left alone otherwise.
FLEXVAR_DECLARE_CPU_KERNEL(embed_resample_rows,
                           (const EmbedResampleParams<float>& params, float* scratch, int64_t begin,
                            int64_t end, int64_t* invalid));
FLEXVAR_DECLARE_CPU_KERNEL(embed_resample_rows_double,
                           (const EmbedResampleParams<double>& params, double* scratch,
                            int64_t begin, int64_t end, int64_t* invalid));

// Grid rows [begin, end) of B * y.out_size. `scratch` holds x.in_size * dim +
// kEmbedScratchPadding elements.
FLEXVAR_DECLARE_CPU_KERNEL(embed_adjoint_rows, (const EmbedAdjointParams<float>& params,
                                                float* scratch, int64_t begin, int64_t end));
FLEXVAR_DECLARE_CPU_KERNEL(embed_adjoint_rows_double,
                           (const EmbedAdjointParams<double>& params, double* scratch,
                            int64_t begin, int64_t end));

// Codes [begin, end). `scratch` holds dim + kEmbedScratchPadding elements.
FLEXVAR_DECLARE_CPU_KERNEL(embed_scatter_codes, (const EmbedScatterParams<float>& params,
                                                 float* scratch, int64_t begin, int64_t end));
FLEXVAR_DECLARE_CPU_KERNEL(embed_scatter_codes_double,
                           (const EmbedScatterParams<double>& params, double* scratch,
                            int64_t begin, int64_t end));

}  // namespace flexvar
