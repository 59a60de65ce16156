#include "embed_resample/cpu_kernel.h"

#include <type_traits>

#include "common/cpu_vector.h"
#include "common/inverse_length.h"

namespace flexvar::FLEXVAR_ISA {

// Calls body(taps) with the number of taps as a constant where it is a usual one (1 to 4), so that
// the sums over them unroll; 0 stands for any other number.
template <typename Body>
static inline void with_taps(int64_t count, const Body& body) {
  switch (count) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    default:
      return body(std::integral_constant<int, 0>());
  }
}

// The sum over k of weights[k] * term(k): `Taps` terms, or `count` where that is 0. The adjoint has
// cells without any.
template <int Taps, typename Real, typename Term>
static inline Vector<Real> weighted_sum(const Real* weights, int64_t count, const Term& term) {
  Vector<Real> sum{};
  if constexpr (Taps == 0) {
    for (int64_t k = 0; k < count; ++k) sum += weights[k] * term(k);
  } else {
    sum = weights[0] * term(0);
#pragma GCC unroll 4
    for (int64_t k = 1; k < Taps; ++k) sum += weights[k] * term(k);
  }
  return sum;
}

// out[i] = sum over k of weights[k] * in[k * stride + i] for i < n: the vertical sums of a row,
// whose pixels and channels are one run of memory. Reads nothing at or behind in_end; writes up to
// a vector behind out + n.
template <typename T, typename Real>
static void sum_rows(Real* out, const T* in, const T* in_end, int64_t stride, const Real* weights,
                     int64_t count, int64_t n) {
  constexpr int64_t lanes = VectorOf<Real>::lanes;
  with_taps(count, [&](auto taps) {
    const int64_t readable = in_end - in - (count - 1) * stride;
    int64_t i = 0;
    for (; i < n && i + lanes <= readable; i += lanes) {
      store(out + i, weighted_sum<taps()>(weights, count,
                                          [&](int64_t k) { return load(in + k * stride + i); }));
    }
    for (; i < n; i += lanes) {
      store(out + i, weighted_sum<taps()>(weights, count, [&](int64_t k) {
              const T* source = in + k * stride + i;
              return load_first(source, in_end - source);
            }));
    }
  });
}

// The horizontal sums of a row of pixels of `dim` channels. `in` is readable up to a vector behind
// its end.
template <typename T, typename Real>
static void sum_columns(T* out, const Real* in, const ResampleTaps<Real>& x, int64_t dim) {
  constexpr int64_t lanes = VectorOf<Real>::lanes;
  for (int64_t q = 0; q < x.out_size;) {
    const int64_t count = x.count[q];
    with_taps(count, [&](auto taps) {
      for (; q < x.out_size && x.count[q] == count; ++q) {
        const Real *weights = x.weights + q * x.stride, *source = in + x.start[q] * dim;
        T* pixel = out + q * dim;
        const auto sum = [&](int64_t c) {
          return weighted_sum<taps()>(weights, count,
                                      [&](int64_t k) { return load(source + k * dim + c); });
        };
        int64_t c = 0;
        for (; c + lanes <= dim; c += lanes) store(pixel + c, sum(c));
        if (c < dim) store_first(pixel + c, sum(c), dim - c);
      }
    });
  }
}

template <typename V>
static inline auto sum_of_lanes(V v) {
  if constexpr (sizeof(V) == 2 * sizeof(v[0])) {
    return v[0] + v[1];
  } else {
    using Real = std::remove_cvref_t<decltype(v[0])>;
    typedef Real HalfVector __attribute__((vector_size(sizeof(V) / 2)));
    HalfVector halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    return sum_of_lanes(HalfVector(halves[0] + halves[1]));
  }
}

template <typename T, typename Real>
static inline Vector<Real> squares(const T* code, int64_t dim) {
  Vector<Real> sum = {};
  for (int64_t c = 0; c < dim; c += VectorOf<Real>::lanes) {
    const Vector<Real> v = load_first(code + c, dim - c);
    sum += v * v;
  }
  return sum;
}

template <typename Real>
static inline Vector<Real> inverse_norms(Vector<Real> squared) {
  return 1 / larger(Vector<Real>{} + kShortestLength<Real>, square_roots(squared));
}

// grid[i] = the code at indices[i], scaled to length 1 if asked for, for i < n. As many codes at a
// time as a vector has lanes: their norms then cost one square root and one division. Returns the
// first i whose index is none, or n. Writes up to a vector behind grid[n - 1].
template <typename T, typename Real>
static int64_t gather_codes(const EmbedResampleParams<Real>& params, const int64_t* indices,
                            int64_t n, Real* grid) {
  constexpr int64_t lanes = VectorOf<Real>::lanes;
  const T* codebook = static_cast<const T*>(params.codebook);
  const int64_t dim = params.dim;
  for (int64_t first = 0; first < n; first += lanes) {
    const int64_t count = n - first < lanes ? n - first : lanes;
    const T* codes[lanes];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = indices[first + i];
      if (index < 0 || index >= params.num_codes) return first + i;
      codes[i] = codebook + index * dim;
    }
    Real scales[lanes];
    if (params.normalize) {
      Vector<Real> rows[lanes] = {};
      for (int64_t i = 0; i < count; ++i) rows[i] = squares<T, Real>(codes[i], dim);
      transpose<Real>(rows);
      Vector<Real> sum = rows[0];
#pragma GCC unroll 16
      for (int64_t i = 1; i < lanes; ++i) sum += rows[i];
      store(scales, inverse_norms<Real>(sum));
    } else {
      for (int64_t i = 0; i < lanes; ++i) scales[i] = 1;
    }
    for (int64_t i = 0; i < count; ++i) {
      Real* cell = grid + (first + i) * dim;
      for (int64_t c = 0; c < dim; c += lanes) {
        store(cell + c, scales[i] * load_first(codes[i] + c, dim - c));
      }
    }
  }
  return n;
}

template <typename T, typename Real>
static void embed_rows(const EmbedResampleParams<Real>& params, Real* scratch, int64_t begin,
                       int64_t end, int64_t* invalid) {
  const auto& y = params.y;
  const auto& x = params.x;
  const int64_t dim = params.dim, row_size = x.in_size * dim;
  Real* grid = scratch;
  const Real* grid_end = grid + y.in_size * row_size + kEmbedScratchPadding;
  Real* row = grid + y.in_size * row_size + kEmbedScratchPadding;
  for (int64_t r = begin; r < end;) {
    // The rows of one image: gather what they need of its grid, then resample.
    const int64_t image = r / y.out_size, top = r % y.out_size;
    const int64_t rows = end - r < y.out_size - top ? end - r : y.out_size - top;
    const int64_t bottom = top + rows - 1;
    const int64_t first = y.start[top] * x.in_size,
                  cells = (y.start[bottom] + y.count[bottom]) * x.in_size - first;
    const int64_t position = image * y.in_size * x.in_size + first;
    const int64_t valid =
        gather_codes<T>(params, params.indices + position, cells, grid + first * dim);
    if (valid < cells) {
      *invalid = position + valid;
      return;
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

// With e = c / n, n = max(|c|, 1e-12), the gradient g of e becomes (g - e (e . g)) / n, or g / n
// where the norm is clamped. Of e = c it stays g, whatever c is.
template <typename T, typename Real>
static void scatter_codes(const EmbedScatterParams<Real>& params, Real* scratch, int64_t begin,
                          int64_t end) {
  const int64_t dim = params.dim, lanes = VectorOf<Real>::lanes;
  for (int64_t v = begin; v < end; ++v) {
    const T* code = static_cast<const T*>(params.codebook) + v * dim;
    T* out = static_cast<T*>(params.grad_codebook) + v * dim;
    const int64_t first = params.first[v], last = params.first[v + 1];
    const bool through_norm = params.normalize && first < last;
    const Real inverse =
        through_norm
            ? inverse_norms<Real>(Vector<Real>{} + sum_of_lanes(squares<T, Real>(code, dim)))[0]
            : Real(1);
    const bool clamped = inverse >= inverse_length(Real(0));
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
    const Real along = sum_of_lanes(products) * inverse * inverse;
    for (int64_t c = 0; c < dim; c += lanes) {
      Vector<Real> across = load(scratch + c);
      if (through_norm && !clamped) across -= along * load_first(code + c, dim - c);
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
