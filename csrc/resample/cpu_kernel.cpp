#include "resample/cpu_kernel.h"

#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

// The sum of term(k) over a window. Longer chains than these lose what is small beside them.
constexpr int64_t kChain = 8;
template <typename Term>
static inline __attribute__((always_inline)) auto sum_of_window(int64_t count, const Term& term) {
  auto sum = term(0);  // not 0 + term(0), as -0 is the sum of negative zeros
  for (int64_t k = 1; k < count && k < kChain; ++k) sum += term(k);
  for (int64_t begin = kChain; begin < count; begin += kChain) {
    auto part = term(begin);
    for (int64_t k = begin + 1; k < count && k < begin + kChain; ++k) part += term(k);
    sum += part;
  }
  return sum;
}

// As many output rows as a vector has lanes, each with its own plane and vertical window:
// the vertical sums run along x, are transposed so that lanes are rows, and the horizontal sums
// then need one weight for all lanes; transposed again on the way out.
template <typename T, typename Real>
static void resample_row_block(const Resample2dParams<Real>& params, Real* scratch, int64_t begin,
                               int64_t rows) {
  constexpr int64_t lanes = VectorOf<Real>::lanes;
  const auto& y = params.y;
  const auto& x = params.x;
  const T* in = static_cast<const T*>(params.in);
  T* out = static_cast<T*>(params.out) + begin * x.out_size;
  const T* in_end = in + params.planes * y.in_size * x.in_size;
  Vector<Real> square[lanes] = {};

  const T* first_row[lanes];  // of the row's vertical window
  const Real* weights[lanes];
  int64_t count[lanes];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t plane = (begin + r) / y.out_size, i = (begin + r) % y.out_size;
    first_row[r] = in + (plane * y.in_size + y.start[i]) * x.in_size;
    weights[r] = y.weights + i * y.stride;
    count[r] = y.count[i];
  }

  for (int64_t p = 0; p < x.in_size; p += lanes) {
    for (int64_t r = 0; r < rows; ++r) {
      square[r] = sum_of_window(count[r], [&](int64_t k) {
        // What lies behind the row's end is some other row, and goes into lanes nobody reads.
        const T* source = first_row[r] + k * x.in_size + p;
        return weights[r][k] * load_first(source, in_end - source);
      });
    }
    transpose<Real>(square);
    for (int64_t j = 0; j < lanes; ++j) store(scratch + (p + j) * lanes, square[j]);
  }

  for (int64_t q = 0; q < x.out_size; q += lanes) {
    const int64_t columns = q + lanes < x.out_size ? lanes : x.out_size - q;
    for (int64_t j = 0; j < columns; ++j) {
      const Real* weight = x.weights + (q + j) * x.stride;
      const Real* source = scratch + x.start[q + j] * lanes;
      square[j] = sum_of_window(x.count[q + j],
                                [&](int64_t k) { return weight[k] * load(source + k * lanes); });
    }
    transpose<Real>(square);
    for (int64_t r = 0; r < rows; ++r) store_first(out + r * x.out_size + q, square[r], columns);
  }
}

template <typename T, typename Real>
static void resample_all_rows(const Resample2dParams<Real>& params, Real* scratch, int64_t begin,
                              int64_t end) {
  constexpr int64_t lanes = VectorOf<Real>::lanes;
  for (int64_t row = begin; row < end; row += lanes) {
    resample_row_block<T>(params, scratch, row, row + lanes < end ? lanes : end - row);
  }
}

void resample2d_rows(const Resample2dParams<float>& params, float* scratch, int64_t begin,
                     int64_t end) {
  switch (params.element) {
    case Element::float16:
      return resample_all_rows<Half>(params, scratch, begin, end);
    case Element::bfloat16:
      return resample_all_rows<Bfloat16>(params, scratch, begin, end);
    default:
      return resample_all_rows<float>(params, scratch, begin, end);
  }
}

void resample2d_rows_double(const Resample2dParams<double>& params, double* scratch, int64_t begin,
                            int64_t end) {
  resample_all_rows<double>(params, scratch, begin, end);
}

}  // namespace flexvar::FLEXVAR_ISA
