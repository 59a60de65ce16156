#include "layer_norm_modulate/cpu_kernel.h"

#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

constexpr int64_t kUnroll = 4;  // sums under way at a time: additions are slow to finish
constexpr int64_t kStep = kUnroll * kFloatLanes;
static_assert(norm_scratch(1) % kStep == 0);
// Longer chains of sums lose what is small beside them.
constexpr int64_t kChain = 8;

static inline const float* vector_of(const NormVectors& vectors, int64_t image) {
  return vectors.data + image * vectors.stride;
}

static inline float total_of(Vector<float> lanes) {
  float total[kFloatLanes];
  store(total, lanes);
#pragma GCC unroll 4
  for (int64_t half = kFloatLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
  }
  return total[0];
}

// The sums over a row of scratch of what `add` adds at i to kCount vectors, in one order for a
// given length.
template <int kCount>
struct Sums {
  Vector<float> of[kCount] = {};
};
template <int kCount, typename Add>
static inline Sums<kCount> sums_of(int64_t columns, const Add& add) {
  Sums<kCount> result;
  for (int64_t begin = 0; begin < columns; begin += kChain * kStep) {
    const int64_t end = columns - begin < kChain * kStep ? columns : begin + kChain * kStep;
    Sums<kCount> sums[kUnroll];
    for (int64_t i = begin; i < end; i += kStep) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < kUnroll; ++j) add(i + j * kFloatLanes, sums[j].of);
    }
#pragma GCC unroll 2
    for (int s = 0; s < kCount; ++s) {
      result.of[s] += (sums[0].of[s] + sums[1].of[s]) + (sums[2].of[s] + sums[3].of[s]);
    }
  }
  return result;
}
template <typename Term>
static inline float sum_of(int64_t columns, const Term& term) {
  return total_of(
      sums_of<1>(columns, [&](int64_t i, Vector<float>* sum) { sum[0] += term(i); }).of[0]);
}

static inline void fill(float* row, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; ++i) row[i] = value;
}

// A mean is rounded, which counts where it is large beside the deviation: `offset` is what it is
// off by, as a share of the deviation.
struct Moments {
  float mean, offset, reciprocal_deviation;

  Vector<float> normalize(Vector<float> x) const {
    return (x - mean) * reciprocal_deviation - offset;
  }
};

// Of a row of scratch; what lies behind its end becomes the mean, and counts for nothing.
static inline Moments moments_of(float* row, int64_t columns, float eps) {
  const int64_t padded = norm_scratch(columns);
  const float count = static_cast<float>(columns);
  fill(row, columns, padded, 0);
  const float mean = sum_of(columns, [&](int64_t i) { return load(row + i); }) / count;
  fill(row, columns, padded, mean);
  const Sums<2> sums = sums_of<2>(columns, [&](int64_t i, Vector<float>* sum) {
    const Vector<float> difference = load(row + i) - mean;
    sum[0] += difference;
    sum[1] += difference * difference;
  });
  const float rest = total_of(sums.of[0]) / count;
  // In double, as a square may be beyond a float's range, and infinity less infinity is no number.
  const auto variance = static_cast<float>(total_of(sums.of[1]) / count - double{rest} * rest);
  // Of equal numbers it may come out below 0. NaN stays NaN.
  const float reciprocal_deviation = 1 / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps);
  return {mean, rest * reciprocal_deviation, reciprocal_deviation};
}

template <typename T>
static void load_row(float* row, const void* x, int64_t offset, int64_t columns) {
  const T* source = static_cast<const T*>(x) + offset;
  for (int64_t i = 0; i < columns; i += kFloatLanes) {
    store(row + i, load_first(source + i, columns - i));
  }
}

// row += gate * branch
template <typename T>
static void add_branch(float* row, const float* gate, const void* branch, int64_t offset,
                       int64_t columns) {
  const T* source = static_cast<const T*>(branch) + offset;
  for (int64_t i = 0; i < columns; i += kFloatLanes) {
    const int64_t count = columns - i;
    store(row + i, load(row + i) + load_first(gate + i, count) * load_first(source + i, count));
  }
}

// row += x
template <typename T>
static void add_row(float* row, const void* x, int64_t offset, int64_t columns) {
  const T* source = static_cast<const T*>(x) + offset;
  for (int64_t i = 0; i < columns; i += kFloatLanes) {
    store(row + i, load(row + i) + load_first(source + i, columns - i));
  }
}

// With row = grad_x: its products with the branch to the sums, those with the gate to grad_branch.
template <typename T>
static void branch_gradients(const float* row, const float* gate, const void* branch, float* sums,
                             void* grad_branch, int64_t offset, int64_t columns) {
  const T* source = static_cast<const T*>(branch) + offset;
  T* target = static_cast<T*>(grad_branch) + offset;
  for (int64_t i = 0; i < columns; i += kFloatLanes) {
    const int64_t count = columns - i;
    const Vector<float> grad = load(row + i);
    store(sums + i, load(sums + i) + grad * load_first(source + i, count));
    store_first(target + i, grad * load_first(gate + i, count), count);
  }
}

// To y, rounded; and what was rounded back to the row.
template <typename T>
static void store_row(float* row, void* y, int64_t offset, int64_t columns) {
  T* target = static_cast<T*>(y) + offset;
  for (int64_t i = 0; i < columns; i += kFloatLanes) {
    store_first(target + i, load(row + i), columns - i);
    if constexpr (!__is_same(T, float)) store(row + i, load_first(target + i, columns - i));
  }
}

template <typename T>
static void modulate_row(const float* row, const Moments& moments, const float* scale,
                         const float* shift, void* out, int64_t offset, int64_t columns) {
  T* target = static_cast<T*>(out) + offset;
  for (int64_t i = 0; i < columns; i += kFloatLanes) {
    const int64_t count = columns - i;
    const Vector<float> norm = moments.normalize(load(row + i));
    store_first(target + i, norm * load_first(scale + i, count) + load_first(shift + i, count),
                count);
  }
}

#define FLEXVAR_FOR_ELEMENT(element, function, ...) \
  switch (element) {                                \
    case FloatElement::float32:                     \
      function<float>(__VA_ARGS__);                 \
      break;                                        \
    case FloatElement::float16:                     \
      function<Half>(__VA_ARGS__);                  \
      break;                                        \
    case FloatElement::bfloat16:                    \
      function<Bfloat16>(__VA_ARGS__);              \
      break;                                        \
  }

void layer_norm_modulate_rows(const LayerNormModulateParams& params, float* scratch, int64_t begin,
                              int64_t end) {
  const int64_t columns = params.columns;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / params.rows_per_image, offset = row * columns;
    FLEXVAR_FOR_ELEMENT(params.x_element, load_row, scratch, params.x, offset, columns);
    if (params.branch) {
      FLEXVAR_FOR_ELEMENT(params.branch_element, add_branch, scratch, vector_of(params.gate, image),
                          params.branch, offset, columns);
      FLEXVAR_FOR_ELEMENT(params.x_element, store_row, scratch, params.y, offset, columns);
    }
    const Moments moments = moments_of(scratch, columns, params.eps);
    FLEXVAR_FOR_ELEMENT(params.out_element, modulate_row, scratch, moments,
                        vector_of(params.scale, image), vector_of(params.shift, image), params.out,
                        offset, columns);
  }
}

// With n = LN(x) and g = grad_out * scale: grad_x = (g - mean(g) - n * mean(g * n)) / deviation, to
// which grad_y is added before it is rounded; grad_branch = grad_x * gate.
void layer_norm_modulate_backward_rows(const LayerNormModulateBackwardParams& params,
                                       float* scratch, float* sums, int64_t begin, int64_t end) {
  const int64_t columns = params.columns, padded = norm_scratch(columns);
  const float count = static_cast<float>(columns);
  float *const norm = scratch, *const grad = scratch + padded;
  float *const scale_sums = sums, *const shift_sums = sums + padded;
  float* const gate_sums = sums + 2 * padded;  // if there is a branch
  fill(sums, 0, (params.branch ? 3 : 2) * padded, 0);
  fill(grad, columns, padded, 0);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * columns;
    const int64_t image = row / params.rows_per_image;
    const float* const scale = vector_of(params.scale, image);
    FLEXVAR_FOR_ELEMENT(params.x_element, load_row, norm, params.x, offset, columns);
    FLEXVAR_FOR_ELEMENT(params.grad_element, load_row, grad, params.grad_out, offset, columns);
    const Moments moments = moments_of(norm, columns, params.eps);
    for (int64_t i = 0; i < columns; i += kFloatLanes) {
      const Vector<float> n = moments.normalize(load(norm + i));
      const Vector<float> g = load(grad + i);
      store(norm + i, n);
      store(scale_sums + i, load(scale_sums + i) + g * n);
      store(shift_sums + i, load(shift_sums + i) + g);
      store(grad + i, g * load_first(scale + i, columns - i));
    }
    fill(norm, columns, padded, 0);
    const float mean = sum_of(columns, [&](int64_t i) { return load(grad + i); }) / count;
    const float projection =
        sum_of(columns, [&](int64_t i) { return load(grad + i) * load(norm + i); }) / count;
    for (int64_t i = 0; i < columns; i += kFloatLanes) {
      store(grad + i,
            (load(grad + i) - mean - load(norm + i) * projection) * moments.reciprocal_deviation);
    }
    if (params.branch) {
      FLEXVAR_FOR_ELEMENT(params.grad_y_element, add_row, grad, params.grad_y, offset, columns);
      FLEXVAR_FOR_ELEMENT(params.branch_element, branch_gradients, grad,
                          vector_of(params.gate, image), params.branch, gate_sums,
                          params.grad_branch, offset, columns);
    }
    FLEXVAR_FOR_ELEMENT(params.x_element, store_row, grad, params.grad_x, offset, columns);
    fill(grad, columns, padded, 0);
  }
}

}  // namespace flexvar::FLEXVAR_ISA
