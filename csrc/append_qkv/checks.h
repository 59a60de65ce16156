// What the launchers of CPU and CUDA check alike.
#pragma once

#include <optional>

#include "common/tensor_checks.h"

namespace flexvar {

inline ScalarType append_qkv_arithmetic(const Tensor& qkv) {
  return qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_append_qkv(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache,
                             int64_t position, const std::optional<Tensor>& q_scale) {
  constexpr const char* kOp = "append_qkv";
  check_rank(qkv, 5, kOp, "qkv");
  const bool is_double = qkv.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || is_floating(qkv.scalar_type()), kOp,
                  ": qkv has an unexpected dtype");
  STD_TORCH_CHECK(qkv.size(2) == 3 && qkv.size(4) > 0 && qkv.size(4) % 32 == 0, kOp,
                  ": qkv must be [B, l, 3, H, D], D a multiple of 32");
  check_rank(k_cache, 4, kOp, "k_cache");
  for (const auto& [cache, name] : {std::pair(k_cache, "k_cache"), std::pair(v_cache, "v_cache")}) {
    check_rank(cache, 4, kOp, name);
    check_dtype(cache, k_cache.scalar_type(), kOp, name);
    check_same_device(qkv, cache, kOp, name);
    STD_TORCH_CHECK(is_double == (cache.scalar_type() == ScalarType::Double) &&
                        (is_double || is_floating(cache.scalar_type())),
                    kOp, ": ", name, " has an unexpected dtype");
    STD_TORCH_CHECK(cache.size(0) == qkv.size(0) && cache.size(1) == k_cache.size(1) &&
                        cache.size(2) == qkv.size(3) && cache.size(3) == qkv.size(4),
                    kOp, ": ", name, " has an unexpected shape");
    STD_TORCH_CHECK(cache.stride(3) == 1 && cache.stride(2) == cache.size(3), kOp, ": ", name,
                    " must have contiguous heads");
  }
  STD_TORCH_CHECK(position >= 0 && qkv.size(1) <= k_cache.size(1) - position, kOp,
                  ": position must leave room for l tokens");
  if (q_scale) {
    check_rank(*q_scale, 1, kOp, "q_scale");
    check_dtype(*q_scale, append_qkv_arithmetic(qkv), kOp, "q_scale");
    check_same_device(qkv, *q_scale, kOp, "q_scale");
    STD_TORCH_CHECK(q_scale->size(0) == qkv.size(3), kOp, ": q_scale must be [H]");
  }
}

// The address of token `position` of the first image.
inline void* cache_row(Tensor& cache, int64_t position) {
  const int64_t element = cache.scalar_type() == ScalarType::Double  ? 8
                          : cache.scalar_type() == ScalarType::Float ? 4
                                                                     : 2;
  return static_cast<char*>(cache.mutable_data_ptr()) + position * cache.stride(1) * element;
}

}  // namespace flexvar
