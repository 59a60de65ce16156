#include "embed_resample/cpu_kernel.h"

#include "resample/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

// out[i] = sum over k of weights[k] * in[k * stride + i] for i < n: the vertical sums of a row,
// whose pixels and channels are one run of memory. Reads nothing at or behind in_end; writes up to
// a vector behind out + n.
template <typename T, typename Real>
static void sum_rows(Real* out, const T* in, const T* in_end, int64_t stride, const Real* weights,
                     int64_t count, int64_t n) {
  for (int64_t i = 0; i < n; i += VectorOf<Real>::lanes) {
    Vector<Real> sum = {};
    for (int64_t k = 0; k < count; ++k) {
      const T* source = in + k * stride + i;
      const Vector<Real> term = weights[k] * load_first(source, in_end - source);
      sum = k == 0 ? term : sum + term;
    }
    store(out + i, sum);
  }
}

// The horizontal sums of a row of pixels of `dim` channels. `in` is readable up to a vector behind
// its end.
template <typename T, typename Real>
static void sum_columns(T* out, const Real* in, const ResampleTaps<Real>& x, int64_t dim) {
  for (int64_t q = 0; q < x.out_size; ++q) {
    const Real* weights = x.weights + q * x.stride;
    for (int64_t c = 0; c < dim; c += VectorOf<Real>::lanes) {
      const Real* source = in + x.start[q] * dim + c;
      Vector<Real> sum = {};
      for (int64_t k = 0; k < x.count[q]; ++k) {
        const Vector<Real> term = weights[k] * load(source + k * dim);
        sum = k == 0 ? term : sum + term;
      }
      store_first(out + q * dim + c, sum, dim - c);
    }
  }
}

template <typename Real>
static Real sum_of_lanes(Vector<Real> v) {
  Real sum = 0;
  for (int64_t i = 0; i < VectorOf<Real>::lanes; ++i) sum += v[i];
  return sum;
}

template <typename T, typename Real>
static Real inverse_norm(const T* code, int64_t dim) {
  Vector<Real> squares = {};
  for (int64_t c = 0; c < dim; c += VectorOf<Real>::lanes) {
    const Vector<Real> v = load_first(code + c, dim - c);
    squares += v * v;
  }
  const Real norm = __builtin_sqrt(sum_of_lanes<Real>(squares));
  return 1 / (norm > Real(kMinCodeNorm) ? norm : Real(kMinCodeNorm));
}

template <typename T, typename Real>
static void embed_rows(const EmbedResampleParams<Real>& params, Real* scratch, int64_t begin,
                       int64_t end, int64_t* invalid) {
  const auto& y = params.y;
  const auto& x = params.x;
  const int64_t dim = params.dim, row_size = x.in_size * dim;
  const T* codebook = static_cast<const T*>(params.codebook);
  Real* grid = scratch;
  const Real* grid_end = grid + y.in_size * row_size + kEmbedScratchPadding;
  Real* row = grid + y.in_size * row_size + kEmbedScratchPadding;
  for (int64_t r = begin; r < end;) {
    // The rows of one image: gather what they need of its grid, then resample.
    const int64_t image = r / y.out_size, top = r % y.out_size;
    const int64_t rows = end - r < y.out_size - top ? end - r : y.out_size - top;
    const int64_t bottom = top + rows - 1;
    const int64_t* indices = params.indices + image * y.in_size * x.in_size;
    for (int64_t cell = y.start[top] * x.in_size;
         cell < (y.start[bottom] + y.count[bottom]) * x.in_size; ++cell) {
      const int64_t index = indices[cell];
      if (index < 0 || index >= params.num_codes) {
        *invalid = image * y.in_size * x.in_size + cell;
        return;
      }
      const T* code = codebook + index * dim;
      const Real scale = params.normalize ? inverse_norm<T, Real>(code, dim) : Real(1);
      for (int64_t c = 0; c < dim; c += VectorOf<Real>::lanes) {
        store(grid + cell * dim + c, scale * load_first(code + c, dim - c));
      }
    }
    for (int64_t i = top; i <= bottom; ++i, ++r) {
      sum_rows(row, grid + y.start[i] * row_size, grid_end, row_size, y.weights + i * y.stride,
               y.count[i], row_size);
      sum_columns(static_cast<T*>(params.tokens) + r * x.out_size * dim, row, x, dim);
    }
  }
}

template <typename T, typename Real>
static void adjoint_rows(const EmbedAdjointParams<Real>& params, Real* scratch, int64_t begin,
                         int64_t end) {
  const auto& y = params.y;
  const auto& x = params.x;
  const int64_t row_size = x.in_size * params.dim;
  const T* tokens = static_cast<const T*>(params.grad_tokens);
  const T* tokens_end = tokens + params.batch * y.in_size * row_size;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t image = r / y.out_size, i = r % y.out_size;
    sum_rows(scratch, tokens + (image * y.in_size + y.start[i]) * row_size, tokens_end, row_size,
             y.weights + i * y.stride, y.count[i], row_size);
    sum_columns(params.grad_grid + r * x.out_size * params.dim, scratch, x, params.dim);
  }
}

// With e = c / n, n = max(|c|, kMinCodeNorm), the gradient g of e becomes (g - e (e . g)) / n, or
// g / n where the norm is clamped.
template <typename T, typename Real>
static void scatter_codes(const EmbedScatterParams<Real>& params, Real* scratch, int64_t begin,
                          int64_t end) {
  const int64_t dim = params.dim, lanes = VectorOf<Real>::lanes;
  for (int64_t v = begin; v < end; ++v) {
    const T* code = static_cast<const T*>(params.codebook) + v * dim;
    T* out = static_cast<T*>(params.grad_codebook) + v * dim;
    const int64_t first = params.first[v], last = params.first[v + 1];
    const bool through_norm = params.normalize && first < last;
    const Real inverse = through_norm ? inverse_norm<T, Real>(code, dim) : Real(1);
    const bool clamped = inverse >= Real(1 / kMinCodeNorm);
    Vector<Real> products = {};
    for (int64_t c = 0; c < dim; c += lanes) {
      Vector<Real> sum = {};
      for (int64_t i = first; i < last; ++i) {
        const Real* cell = params.grad_grid + params.cells[i] * dim + c;
        sum += load_first(cell, dim - c);
      }
      store(scratch + c, sum);
      products += sum * load_first(code + c, dim - c);
    }
    const Real along =
        through_norm && !clamped ? sum_of_lanes<Real>(products) * inverse * inverse : Real(0);
    for (int64_t c = 0; c < dim; c += lanes) {
      const Vector<Real> across = load(scratch + c) - along * load_first(code + c, dim - c);
      store_first(out + c, inverse * across, dim - c);
    }
  }
}

// Calls function<T> for the element's type T.
#define FLEXVAR_BY_ELEMENT(element, function, ...) \
  switch (element) {                               \
    case Element::float16:                         \
      return function<Half>(__VA_ARGS__);          \
    case Element::bfloat16:                        \
      return function<Bfloat16>(__VA_ARGS__);      \
    default:                                       \
      return function<float>(__VA_ARGS__);         \
  }

void embed_resample_rows(const EmbedResampleParams<float>& params, float* scratch, int64_t begin,
                         int64_t end, int64_t* invalid) {
  FLEXVAR_BY_ELEMENT(params.element, embed_rows, params, scratch, begin, end, invalid)
}
void embed_resample_rows_double(const EmbedResampleParams<double>& params, double* scratch,
                                int64_t begin, int64_t end, int64_t* invalid) {
  embed_rows<double>(params, scratch, begin, end, invalid);
}

void embed_adjoint_rows(const EmbedAdjointParams<float>& params, float* scratch, int64_t begin,
                        int64_t end) {
  FLEXVAR_BY_ELEMENT(params.element, adjoint_rows, params, scratch, begin, end)
}
void embed_adjoint_rows_double(const EmbedAdjointParams<double>& params, double* scratch,
                               int64_t begin, int64_t end) {
  adjoint_rows<double>(params, scratch, begin, end);
}

void embed_scatter_codes(const EmbedScatterParams<float>& params, float* scratch, int64_t begin,
                         int64_t end) {
  FLEXVAR_BY_ELEMENT(params.element, scatter_codes, params, scratch, begin, end)
}
void embed_scatter_codes_double(const EmbedScatterParams<double>& params, double* scratch,
                                int64_t begin, int64_t end) {
  scatter_codes<double>(params, scratch, begin, end);
}

}  // namespace flexvar::FLEXVAR_ISA
