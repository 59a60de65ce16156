// What the launchers of CPU and CUDA check and work out alike.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "scale_attention/plan.h"

namespace flexvar {

namespace detail {

inline void check_query(const Tensor& q, const char* op) {
  check_rank(q, 4, op, "q");
  STD_TORCH_CHECK(is_floating(q.scalar_type()) || q.scalar_type() == ScalarType::Double, op,
                  ": q has an unexpected dtype");
  const int64_t dim = q.size(3);
  STD_TORCH_CHECK(dim == 32 || dim == 64 || dim == 96 || dim == 128, op,
                  ": head dim must be 32, 64, 96 or 128, got ", dim);
  STD_TORCH_CHECK(q.size(1) < (int64_t{1} << 31), op, ": too many tokens");
}

inline void check_like_query(const Tensor& t, const Tensor& q, int64_t tokens, const char* op,
                             const char* name) {
  check_rank(t, 4, op, name);
  check_dtype(t, q.scalar_type(), op, name);
  check_same_device(q, t, op, name);
  STD_TORCH_CHECK(t.size(0) == q.size(0) && t.size(1) == tokens && t.size(2) == q.size(2) &&
                      t.size(3) == q.size(3),
                  op, ": ", name, " has an unexpected shape");
}

inline void check_scale_lengths(const std::vector<int64_t>& scale_lengths, int64_t tokens,
                                const char* op) {
  int64_t total = 0;
  for (const int64_t length : scale_lengths) {
    STD_TORCH_CHECK(length >= 0 && length <= tokens - total, op,
                    ": scale_lengths must not be negative and sum to L");
    total += length;
  }
  STD_TORCH_CHECK(total == tokens, op, ": scale_lengths must sum to L");
}

}  // namespace detail

// Type of logsumexp, q_scale and what belongs to it: that of the arithmetic.
inline ScalarType attention_arithmetic(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

namespace detail {

// One number a head.
inline void check_of_heads(const std::optional<Tensor>& t, const Tensor& q, const char* op,
                           const char* name) {
  if (!t) return;
  check_rank(*t, 1, op, name);
  check_dtype(*t, attention_arithmetic(q), op, name);
  check_same_device(q, *t, op, name);
  STD_TORCH_CHECK(t->size(0) == q.size(2), op, ": ", name, " must have shape [H]");
}

}  // namespace detail

inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::vector<int64_t>& scale_lengths,
                            const std::optional<Tensor>& q_scale) {
  const char* op = "scale_attention";
  detail::check_query(q, op);
  detail::check_like_query(k, q, q.size(1), op, "k");
  detail::check_like_query(v, q, q.size(1), op, "v");
  detail::check_scale_lengths(scale_lengths, q.size(1), op);
  detail::check_of_heads(q_scale, q, op, "q_scale");
}

inline void check_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                     const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                                     const std::vector<int64_t>& scale_lengths,
                                     const std::optional<Tensor>& q_scale,
                                     const Tensor& inverse_lengths) {
  const char* op = "scale_attention_backward";
  check_attention(q, k, v, scale_lengths, q_scale);
  detail::check_like_query(grad_out, q, q.size(1), op, "grad_out");
  detail::check_like_query(out, q, q.size(1), op, "out");
  check_rank(logsumexp, 3, op, "logsumexp");
  check_dtype(logsumexp, attention_arithmetic(q), op, "logsumexp");
  check_same_device(q, logsumexp, op, "logsumexp");
  STD_TORCH_CHECK(logsumexp.size(0) == q.size(0) && logsumexp.size(1) == q.size(2) &&
                      logsumexp.size(2) == q.size(1),
                  op, ": logsumexp must have shape [B, H, L]");
  check_rank(inverse_lengths, 4, op, "inverse_lengths");
  check_dtype(inverse_lengths, attention_arithmetic(q), op, "inverse_lengths");
  check_same_device(q, inverse_lengths, op, "inverse_lengths");
  STD_TORCH_CHECK(inverse_lengths.size(0) == (q_scale ? 2 : 0) &&
                      inverse_lengths.size(1) == q.size(0) &&
                      inverse_lengths.size(2) == q.size(2) && inverse_lengths.size(3) == q.size(1),
                  op, ": inverse_lengths must have shape [2 with q_scale, otherwise 0, B, H, L]");
}

inline void check_attention_step(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                 int64_t kv_length, const std::optional<Tensor>& logit_bound) {
  const char* op = "scale_attention_step";
  detail::check_query(q, op);
  check_rank(k_cache, 4, op, "k_cache");
  detail::check_like_query(k_cache, q, k_cache.size(1), op, "k_cache");
  detail::check_like_query(v_cache, q, k_cache.size(1), op, "v_cache");
  STD_TORCH_CHECK(kv_length >= 1 && kv_length <= k_cache.size(1) && kv_length < (int64_t{1} << 31),
                  op, ": kv_length must be from 1 to L_max");
  detail::check_of_heads(logit_bound, q, op, "logit_bound");
}

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}
inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& t) {
  return t ? as_contiguous(*t) : t;
}

// The part of q (0) or k (1) of inverse_lengths: what they are multiplied by to have length 1. Null
// where nothing is normalised.
inline void* inverse_lengths_of(const Tensor& inverse_lengths, int part) {
  if (inverse_lengths.numel() == 0) return nullptr;
  const int64_t bytes = inverse_lengths.scalar_type() == ScalarType::Double ? 8 : 4;
  return static_cast<char*>(inverse_lengths.mutable_data_ptr()) +
         part * inverse_lengths.numel() / 2 * bytes;
}

// The rows of D elements must be contiguous; any other stride may be what it is.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace flexvar
