#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "common/cpu_memory.h"
#include "common/tensor_checks.h"
#include "embed_resample/arguments.h"
#include "embed_resample/cpu_kernel.h"
#include "resample/table.h"

// The kernel for float elements (and below) or for double ones.
#define FLEXVAR_SELECT_BY_REAL(Real, name)             \
  [] {                                                 \
    if constexpr (std::is_same_v<Real, double>) {      \
      return FLEXVAR_SELECT_CPU_KERNEL(name##_double); \
    } else {                                           \
      return FLEXVAR_SELECT_CPU_KERNEL(name);          \
    }                                                  \
  }()

namespace flexvar {
namespace {

// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kWorkPerTask = 100'000;

// Calls body(task, scratch, begin, end) for consecutive ranges of [0, n), in parallel when `work`
// is worth it. No scratch is shared.
template <typename Real, typename Body>
void for_ranges(int64_t n, int64_t work, int64_t scratch_size, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks = std::clamp<int64_t>(work / kWorkPerTask, 1, std::min(n, threads));
  Scratch<Real> scratch(tasks * scratch_size);
  Real* const data = scratch.data();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      body(t, data + t * scratch_size, n * t / tasks, n * (t + 1) / tasks);
    }
  });
}

template <typename Real>
void embed_resample_real(const EmbedShape& s, const Tensor& indices, const Tensor& codebook,
                         Tensor& tokens, bool normalize) {
  const ResampleTable<Real> y(s.mode, s.in_height, s.height), x(s.mode, s.in_width, s.width);
  EmbedResampleParams<Real> params{};
  params.indices = indices.const_data_ptr<int64_t>();
  params.codebook = codebook.const_data_ptr();
  params.tokens = tokens.mutable_data_ptr();
  params.element = s.element;
  params.num_codes = s.num_codes;
  params.dim = s.dim;
  params.normalize = normalize;
  params.y = y.taps();
  params.x = x.taps();
  const auto kernel = FLEXVAR_SELECT_BY_REAL(Real, embed_resample_rows);
  const int64_t rows = s.batch * s.height;
  const int64_t row_work = (s.in_width * params.y.stride + s.width * params.x.stride) * s.dim;
  const int64_t scratch_size = (s.in_height + 1) * s.in_width * s.dim + 2 * kEmbedScratchPadding;
  std::vector<int64_t> invalid(torch::stable::get_num_threads(), -1);
  for_ranges<Real>(rows, rows * row_work, scratch_size,
                   [&](int64_t task, Real* scratch, int64_t begin, int64_t end) {
                     kernel(params, scratch, begin, end, &invalid[task]);
                   });
  for (const int64_t position : invalid) {
    STD_TORCH_CHECK(position < 0, "embed_resample: indices must lie in [0, ", s.num_codes,
                    "), as the codebook has that many codes, got ", params.indices[position]);
  }
}

template <typename Real>
void embed_backward_real(const EmbedShape& s, const Tensor& grad_tokens, const Tensor& indices,
                         const Tensor& codebook, Tensor& grad_codebook, bool normalize) {
  const auto y = ResampleTable<Real>(s.mode, s.in_height, s.height).transposed();
  const auto x = ResampleTable<Real>(s.mode, s.in_width, s.width).transposed();
  const int64_t cells = s.batch * s.in_height * s.in_width;
  Scratch<Real> grad_grid(cells * s.dim);
  EmbedAdjointParams<Real> adjoint{};
  adjoint.grad_tokens = grad_tokens.const_data_ptr();
  adjoint.grad_grid = grad_grid.data();
  adjoint.element = s.element;
  adjoint.batch = s.batch;
  adjoint.dim = s.dim;
  adjoint.y = y.taps();
  adjoint.x = x.taps();
  const auto adjoint_kernel = FLEXVAR_SELECT_BY_REAL(Real, embed_adjoint_rows);
  const int64_t rows = s.batch * s.in_height;
  const int64_t row_work = (s.width * adjoint.y.stride + s.in_width * adjoint.x.stride) * s.dim;
  for_ranges<Real>(rows, rows * row_work, s.width * s.dim + kEmbedScratchPadding,
                   [&](int64_t, Real* scratch, int64_t begin, int64_t end) {
                     adjoint_kernel(adjoint, scratch, begin, end);
                   });

  // Cells by code, in their own order within a code: a counting sort.
  const int64_t* index = indices.const_data_ptr<int64_t>();
  std::vector<int64_t> first(s.num_codes + 2), ordered(cells);
  for (int64_t cell = 0; cell < cells; ++cell) {
    STD_TORCH_CHECK(index[cell] >= 0 && index[cell] < s.num_codes,
                    "embed_resample_backward: indices must lie in [0, ", s.num_codes, "), got ",
                    index[cell]);
    ++first[index[cell] + 2];
  }
  for (int64_t v = 0; v < s.num_codes; ++v) first[v + 2] += first[v + 1];
  for (int64_t cell = 0; cell < cells; ++cell) ordered[first[index[cell] + 1]++] = cell;

  EmbedScatterParams<Real> scatter{};
  scatter.grad_grid = adjoint.grad_grid;
  scatter.cells = ordered.data();
  scatter.first = first.data();
  scatter.codebook = codebook.const_data_ptr();
  scatter.grad_codebook = grad_codebook.mutable_data_ptr();
  scatter.element = s.element;
  scatter.dim = s.dim;
  scatter.normalize = normalize;
  const auto scatter_kernel = FLEXVAR_SELECT_BY_REAL(Real, embed_scatter_codes);
  for_ranges<Real>(s.num_codes, (cells + s.num_codes) * s.dim, s.dim + kEmbedScratchPadding,
                   [&](int64_t, Real* scratch, int64_t begin, int64_t end) {
                     scatter_kernel(scatter, scratch, begin, end);
                   });
}

Tensor embed_resample_cpu(const Tensor& indices, const Tensor& codebook, int64_t height,
                          int64_t width, bool normalize, std::string mode) {
  const EmbedShape s = embed_shape(indices, codebook, height, width, mode, "embed_resample");
  Tensor tokens = empty_cpu({s.batch, height * width, s.dim}, codebook.scalar_type());
  if (tokens.numel() == 0) return tokens;
  const Tensor rows = as_contiguous(indices);
  const Tensor codes = as_contiguous(codebook);
  if (s.element == Element::float64) {
    embed_resample_real<double>(s, rows, codes, tokens, normalize);
  } else {
    embed_resample_real<float>(s, rows, codes, tokens, normalize);
  }
  return tokens;
}

Tensor embed_resample_backward_cpu(const Tensor& grad, const Tensor& indices,
                                   const Tensor& codebook, int64_t height, int64_t width,
                                   bool normalize, std::string mode) {
  const char* op = "embed_resample_backward";
  const EmbedShape s = embed_shape(indices, codebook, height, width, mode, op);
  check_token_gradient(grad, codebook, s, op);
  Tensor grad_codebook = empty_cpu({s.num_codes, s.dim}, codebook.scalar_type());
  if (grad.numel() == 0) return torch::stable::zero_(grad_codebook);
  const Tensor tokens = as_contiguous(grad);
  const Tensor rows = as_contiguous(indices);
  const Tensor codes = as_contiguous(codebook);
  if (s.element == Element::float64) {
    embed_backward_real<double>(s, tokens, rows, codes, grad_codebook, normalize);
  } else {
    embed_backward_real<float>(s, tokens, rows, codes, grad_codebook, normalize);
  }
  return grad_codebook;
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("embed_resample", TORCH_BOX(&embed_resample_cpu));
  m.impl("embed_resample_backward", TORCH_BOX(&embed_resample_backward_cpu));
}

}  // namespace
}  // namespace flexvar
