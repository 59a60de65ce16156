#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "common/cpu_memory.h"
#include "scale_attention/checks.h"
#include "scale_attention/cpu_amx.h"
#include "scale_attention/cpu_kernel.h"

namespace flexvar {
namespace {

AttentionTensor view_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

AttentionShape shape_of(const Tensor& q, int64_t key_count, double softmax_scale,
                        const std::vector<QueryTile>& tiles) {
  return {element_of(q, "scale_attention", "q"),
          q.size(2),
          q.size(1),
          key_count,
          q.size(3),
          softmax_scale,
          tiles.data(),
          static_cast<int64_t>(tiles.size())};
}

// Elements below which a second thread costs more than it brings.
constexpr int64_t kElementsPerTask = 1 << 15;

template <class Params>
void for_tokens(void (*kernel)(const Params&, int64_t, int64_t), const Params& params,
                int64_t batch) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (params.heads * params.dim));
  torch::stable::parallel_for(0, batch * params.tokens, grain,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

// q or k with rows of length 1, times their head's scale, contiguous. `inverse_lengths` is its
// part, read if it is `measured` and written otherwise.
Tensor normalized(const Tensor& x, const void* scale, void* inverse_lengths, bool measured) {
  Tensor out = empty_cpu({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  for_tokens(FLEXVAR_SELECT_CPU_KERNEL(attention_normalize),
             AttentionNormalizeParams{element_of(x, "scale_attention", "x"), x.size(1), x.size(2),
                                      x.size(3), view_of(x), scale, inverse_lengths, measured,
                                      out.mutable_data_ptr()},
             x.size(0));
  return out;
}

// `grad`, that of normalized(x), becomes that of x.
void differentiate_normalized(Tensor& grad, const Tensor& x, const void* scale,
                              const void* inverse_lengths, void* scale_parts) {
  for_tokens(FLEXVAR_SELECT_CPU_KERNEL(attention_normalize_backward),
             AttentionNormalizeBackwardParams{
                 element_of(x, "scale_attention", "x"), x.size(1), x.size(2), x.size(3), view_of(x),
                 scale, inverse_lengths, grad.mutable_data_ptr(), scale_parts},
             x.size(0));
}

// [B, H, L] -> [H], in one order whatever the number of threads.
template <class T>
void sum_of_heads(const Tensor& parts, Tensor& sums) {
  const int64_t batch = parts.size(0), heads = parts.size(1), tokens = parts.size(2);
  const T* data = static_cast<const T*>(parts.const_data_ptr());
  for (int64_t head = 0; head < heads; ++head) {
    double sum = 0;
    for (int64_t image = 0; image < batch; ++image) {
      const T* of_image = data + (image * heads + head) * tokens;
      for (int64_t token = 0; token < tokens; ++token) sum += of_image[token];
    }
    static_cast<T*>(sums.mutable_data_ptr())[head] = static_cast<T>(sum);
  }
}

// Scratch memory for `runs` runs at once: `per_key` + `per_tile` arrays of D numbers for every key
// (in whole blocks) and query of a tile, two blocks of scores, and change.
Scratch<char> scratch_for(const AttentionShape& shape, int64_t runs, int64_t per_key,
                          int64_t per_tile, int64_t* run_bytes) {
  const int64_t numbers =
      ((shape.key_count + kAttentionKeyBlock) * per_key + kAttentionTileQueries * per_tile) *
          shape.dim +
      (2 * kAttentionKeyBlock + 4) * kAttentionTileQueries;
  *run_bytes = numbers * (shape.element == Element::float64 ? 8 : 4) + 64;
  *run_bytes = (*run_bytes + 63) / 64 * 64;
  return Scratch<char>(runs * *run_bytes);
}

// Multiply-adds (tens of microseconds) below which waking another thread costs more than it saves.
constexpr int64_t kWorthAThread = int64_t{1} << 20;

// Runs of tiles of about equal cost, a few for each thread.
void run_forward(const AttentionForwardParams& params, const std::vector<QueryTile>& tiles,
                 int64_t heads) {
  std::vector<int64_t> costs;
  for (const QueryTile& tile : tiles) {
    costs.push_back((tile.query_end - tile.query_begin + 15) / 16 * int64_t{tile.key_end});
  }
  int64_t total = 0;  // in multiples of 16 * D multiply-adds
  for (const int64_t cost : costs) total += cost * heads;
  const int64_t worthwhile = 1 + total * 16 * params.shape.dim / kWorthAThread;
  const std::vector<int64_t> bounds = balanced_runs(
      costs, heads, std::min(worthwhile, 2 * int64_t{torch::stable::get_num_threads()}));
  const int64_t runs = static_cast<int64_t>(bounds.size()) - 1;
  int64_t run_bytes = 0;
  Scratch<char> scratch = scratch_for(params.shape, runs, 2, 2, &run_bytes);
  char* const memory = scratch.data();
  auto kernel = FLEXVAR_SELECT_CPU_KERNEL(attention_forward);
#ifdef FLEXVAR_X86
  if (selected_cpu_isa() == CpuIsa::amx && params.shape.element == Element::bfloat16) {
    kernel = &amx::attention_forward_bfloat16;
  }
#endif
  torch::stable::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      kernel(params, bounds[run], bounds[run + 1], memory + run * run_bytes);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> scale_attention_cpu(const Tensor& q_in, const Tensor& k_in,
                                                       const Tensor& v_in,
                                                       std::vector<int64_t> scale_lengths,
                                                       double softmax_scale,
                                                       std::optional<Tensor> q_scale_in) {
  check_attention(q_in, k_in, v_in, scale_lengths, q_scale_in);
  const int64_t batch = q_in.size(0), tokens = q_in.size(1), heads = q_in.size(2);
  Tensor out = empty_cpu({batch, tokens, heads, q_in.size(3)}, q_in.scalar_type());
  Tensor logsumexp = empty_cpu({batch, heads, tokens}, attention_arithmetic(q_in));
  Tensor inverse_lengths =
      empty_cpu({q_scale_in ? 2 : 0, batch, heads, tokens}, attention_arithmetic(q_in));
  if (batch * tokens * heads == 0) return {out, logsumexp, inverse_lengths};
  const std::optional<Tensor> q_scale = contiguous_or_none(q_scale_in);
  Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in);
  if (q_scale) {
    q = normalized(q, data_or_null(q_scale), inverse_lengths_of(inverse_lengths, 0), false);
    k = normalized(k, nullptr, inverse_lengths_of(inverse_lengths, 1), false);
  }
  const Tensor v = with_contiguous_rows(v_in);
  const std::vector<QueryTile> tiles = query_tiles(scale_lengths, kAttentionTileQueries);
  run_forward({shape_of(q, tokens, softmax_scale, tiles), view_of(q), view_of(k), view_of(v),
               out.mutable_data_ptr(), logsumexp.mutable_data_ptr()},
              tiles, batch * heads);
  return {out, logsumexp, inverse_lengths};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scale_attention_backward_cpu(
    const Tensor& grad_out_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& logsumexp_in, std::vector<int64_t> scale_lengths,
    double softmax_scale, std::optional<Tensor> q_scale_in, const Tensor& inverse_lengths_in) {
  check_attention_backward(grad_out_in, q_in, k_in, v_in, out_in, logsumexp_in, scale_lengths,
                           q_scale_in, inverse_lengths_in);
  const int64_t batch = q_in.size(0), tokens = q_in.size(1), heads = q_in.size(2);
  Tensor grad_q = empty_cpu({batch, tokens, heads, q_in.size(3)}, q_in.scalar_type());
  Tensor grad_k = empty_cpu_alike(grad_q), grad_v = empty_cpu_alike(grad_q);
  Tensor grad_q_scale = empty_cpu({q_scale_in ? heads : 0}, attention_arithmetic(q_in));
  if (batch * tokens * heads == 0) {
    return {grad_q, grad_k, grad_v, torch::stable::fill_(grad_q_scale, 0)};
  }
  const Tensor q_rows = with_contiguous_rows(q_in), k_rows = with_contiguous_rows(k_in),
               v = with_contiguous_rows(v_in), out = with_contiguous_rows(out_in),
               grad_out = with_contiguous_rows(grad_out_in),
               logsumexp = as_contiguous(logsumexp_in),
               inverse_lengths = as_contiguous(inverse_lengths_in);
  const std::optional<Tensor> q_scale = contiguous_or_none(q_scale_in);
  void *q_inverse_lengths = inverse_lengths_of(inverse_lengths, 0),
       *k_inverse_lengths = inverse_lengths_of(inverse_lengths, 1);
  Tensor q = q_rows, k = k_rows;
  if (q_scale) {
    q = normalized(q_rows, data_or_null(q_scale), q_inverse_lengths, true);
    k = normalized(k_rows, nullptr, k_inverse_lengths, true);
  }
  const std::vector<QueryTile> tiles = query_tiles(scale_lengths, kAttentionTileQueries);
  const AttentionBackwardParams params{shape_of(q, tokens, softmax_scale, tiles),
                                       view_of(q),
                                       view_of(k),
                                       view_of(v),
                                       view_of(out),
                                       view_of(grad_out),
                                       logsumexp.const_data_ptr(),
                                       grad_q.mutable_data_ptr(),
                                       grad_k.mutable_data_ptr(),
                                       grad_v.mutable_data_ptr()};
  const int64_t threads = torch::stable::get_num_threads(), items = batch * heads;
  const int64_t runs = std::min(items, threads);
  int64_t run_bytes = 0;
  Scratch<char> scratch = scratch_for(params.shape, runs, 4, 5, &run_bytes);
  char* const memory = scratch.data();
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(attention_backward);
  torch::stable::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      kernel(params, items * run / runs, items * (run + 1) / runs, memory + run * run_bytes);
    }
  });
  if (q_scale) {
    const Tensor parts = torch::stable::empty_like(logsumexp);
    differentiate_normalized(grad_q, q_rows, data_or_null(q_scale), q_inverse_lengths,
                             parts.mutable_data_ptr());
    differentiate_normalized(grad_k, k_rows, nullptr, k_inverse_lengths, nullptr);
    if (parts.scalar_type() == ScalarType::Double) {
      sum_of_heads<double>(parts, grad_q_scale);
    } else {
      sum_of_heads<float>(parts, grad_q_scale);
    }
  }
  return {grad_q, grad_k, grad_v, grad_q_scale};
}

Tensor scale_attention_step_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                int64_t kv_length, double softmax_scale,
                                std::optional<Tensor> logit_bound) {
  // These kernels find the maximum themselves; the bound is only checked.
  check_attention_step(q_in, k_in, v_in, kv_length, logit_bound);
  const int64_t batch = q_in.size(0), tokens = q_in.size(1), heads = q_in.size(2);
  Tensor out = empty_cpu({batch, tokens, heads, q_in.size(3)}, q_in.scalar_type());
  if (batch * tokens * heads == 0) return out;
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
               v = with_contiguous_rows(v_in);
  const std::vector<QueryTile> tiles = step_tiles(tokens, kv_length, kAttentionTileQueries);
  run_forward({shape_of(q, kv_length, softmax_scale, tiles), view_of(q), view_of(k), view_of(v),
               out.mutable_data_ptr(), nullptr},
              tiles, batch * heads);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("scale_attention", TORCH_BOX(&scale_attention_cpu));
  m.impl("scale_attention_backward", TORCH_BOX(&scale_attention_backward_cpu));
  m.impl("scale_attention_step", TORCH_BOX(&scale_attention_step_cpu));
}

}  // namespace
}  // namespace flexvar
