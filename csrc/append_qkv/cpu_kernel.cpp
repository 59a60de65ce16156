#include "append_qkv/cpu_kernel.h"

#include "common/cpu_length.h"
#include "common/inverse_length.h"

namespace flexvar::FLEXVAR_ISA {

template <typename Real, typename From, typename To>
static inline void copy_row(const From* from, To* to, int64_t dim, Real factor) {
  for (int64_t d = 0; d < dim; d += VectorOf<Real>::lanes) {
    const Vector<Real> x = load(from + d);
    store(to + d, x * factor);
  }
}

template <typename Real, typename From, typename To>
static void append_tokens(const AppendQkvParams& p, int64_t begin, int64_t end) {
  const int64_t width = p.heads * p.dim;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t image = token / p.tokens, n = token % p.tokens;
    const From* from = static_cast<const From*>(p.qkv) + token * 3 * width;
    To* q = static_cast<To*>(p.q) + token * width;
    To* k = static_cast<To*>(p.k) + image * p.k_image_stride + n * p.k_token_stride;
    To* v = static_cast<To*>(p.v) + image * p.v_image_stride + n * p.v_token_stride;
    for (int64_t head = 0; head < p.heads; ++head) {
      const From* row = from + head * p.dim;
      Real q_factor = 1, k_factor = 1;
      if (p.q_scale != nullptr) {
        q_factor = inverse_length(square_root(sum_of_squares<Real>(row, p.dim))) *
                   static_cast<const Real*>(p.q_scale)[head];
        k_factor = inverse_length(square_root(sum_of_squares<Real>(row + width, p.dim)));
      }
      copy_row(row, q + head * p.dim, p.dim, q_factor);
      copy_row(row + width, k + head * p.dim, p.dim, k_factor);
      copy_row(row + 2 * width, v + head * p.dim, p.dim, Real(1));
    }
  }
}

template <typename From>
static void append_from(const AppendQkvParams& params, int64_t begin, int64_t end) {
  switch (params.to) {
    case Element::float16:
      return append_tokens<float, From, Half>(params, begin, end);
    case Element::bfloat16:
      return append_tokens<float, From, Bfloat16>(params, begin, end);
    default:
      return append_tokens<float, From, float>(params, begin, end);
  }
}

void append_qkv_tokens(const AppendQkvParams& params, int64_t begin, int64_t end) {
  switch (params.from) {
    case Element::float64:
      return append_tokens<double, double, double>(params, begin, end);
    case Element::float16:
      return append_from<Half>(params, begin, end);
    case Element::bfloat16:
      return append_from<Bfloat16>(params, begin, end);
    default:
      return append_from<float>(params, begin, end);
  }
}

}  // namespace flexvar::FLEXVAR_ISA
