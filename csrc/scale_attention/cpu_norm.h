// Normalisation of queries and keys: a pass before attention, and one behind its gradients.
#pragma once

#include "common/cpu_length.h"
#include "common/inverse_length.h"
#include "scale_attention/cpu_kernel.h"

namespace flexvar::FLEXVAR_ISA {

// Calls run(row of x, row of the contiguous array, head, index in [B, H, L]) for every head of
// tokens [begin, end).
template <typename E, typename Params, typename Run>
static inline void for_each_row(const Params& p, void* contiguous, int64_t begin, int64_t end,
                                const Run& run) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t image = token / p.tokens, n = token % p.tokens;
    const E* x = static_cast<const E*>(p.x.data) + image * p.x.batch_stride + n * p.x.token_stride;
    E* row = static_cast<E*>(contiguous) + token * p.heads * p.dim;
    for (int64_t head = 0; head < p.heads; ++head) {
      run(x + head * p.x.head_stride, row + head * p.dim, head,
          (image * p.heads + head) * p.tokens + n);
    }
  }
}

template <typename T, typename E>
static void normalize_tokens(const AttentionNormalizeParams& p, int64_t begin, int64_t end) {
  T* inverse_lengths = static_cast<T*>(p.inverse_lengths);
  const T* scale = static_cast<const T*>(p.scale);
  for_each_row<E>(p, p.out, begin, end, [&](const E* x, E* out, int64_t head, int64_t index) {
    if (!p.measured) {
      inverse_lengths[index] = inverse_length(square_root(sum_of_squares<T>(x, p.dim)));
    }
    const T factor = inverse_lengths[index] * (scale == nullptr ? T(1) : scale[head]);
    for (int64_t d = 0; d < p.dim; d += VectorOf<T>::lanes) {
      const Vector<T> row = load(x + d);
      store(out + d, row * factor);
    }
  });
}

// With u = x * inverse of length 1 and G the gradient of scale * u: that of x is
// inverse * scale * (G - u <u, G>). Rows too short for that, as with F.normalize, know the factor
// alone.
template <typename T, typename E>
static void normalize_tokens_backward(const AttentionNormalizeBackwardParams& p, int64_t begin,
                                      int64_t end) {
  const T* scale = static_cast<const T*>(p.scale);
  for_each_row<E>(p, p.grad, begin, end, [&](const E* x, E* grad, int64_t head, int64_t index) {
    const T inverse = static_cast<const T*>(p.inverse_lengths)[index];
    Vector<T> products = {};
    for (int64_t d = 0; d < p.dim; d += VectorOf<T>::lanes) {
      const Vector<T> row = load(x + d), g = load(grad + d);
      products += row * inverse * g;
    }
    T product = 0;
    for (int64_t i = 0; i < VectorOf<T>::lanes; ++i) product += products[i];
    const T removed = inverse < inverse_length(T(0)) ? product * inverse : T(0);
    const T factor = inverse * (scale == nullptr ? T(1) : scale[head]);
    for (int64_t d = 0; d < p.dim; d += VectorOf<T>::lanes) {
      const Vector<T> row = load(x + d), g = load(grad + d);
      store(grad + d, (g - row * removed) * factor);
    }
    if (p.scale_parts != nullptr) static_cast<T*>(p.scale_parts)[index] = product;
  });
}

}  // namespace flexvar::FLEXVAR_ISA
