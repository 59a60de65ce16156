#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "append_qkv/checks.h"
#include "append_qkv/cpu_kernel.h"
#include "common/cpu_memory.h"

namespace flexvar {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kElementsPerTask = 1 << 15;

Tensor append_qkv_cpu(const Tensor& qkv_in, Tensor k_cache, Tensor v_cache, int64_t position,
                      std::optional<Tensor> q_scale_in) {
  check_append_qkv(qkv_in, k_cache, v_cache, position, q_scale_in);
  const int64_t batch = qkv_in.size(0), tokens = qkv_in.size(1);
  const int64_t heads = qkv_in.size(3), dim = qkv_in.size(4);
  Tensor q = empty_cpu({batch, tokens, heads, dim}, k_cache.scalar_type());
  if (q.numel() == 0) return q;
  for (Tensor* cache : {&k_cache, &v_cache}) {  // a new one, perhaps
    if (position == 0 && cache->is_contiguous()) {
      advise_large_pages(cache->mutable_data_ptr(), cache->numel() * cache->element_size());
    }
  }
  const Tensor qkv = as_contiguous(qkv_in);
  std::optional<Tensor> q_scale;
  if (q_scale_in) q_scale = as_contiguous(*q_scale_in);
  const AppendQkvParams params{qkv.const_data_ptr(),
                               q_scale ? q_scale->const_data_ptr() : nullptr,
                               q.mutable_data_ptr(),
                               cache_row(k_cache, position),
                               cache_row(v_cache, position),
                               element_of(qkv, "append_qkv", "qkv"),
                               element_of(q, "append_qkv", "q"),
                               tokens,
                               heads,
                               dim,
                               k_cache.stride(0),
                               k_cache.stride(1),
                               v_cache.stride(0),
                               v_cache.stride(1)};
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(append_qkv_tokens);
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (3 * heads * dim));
  torch::stable::parallel_for(0, batch * tokens, grain,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return q;
}

// Memory for a cache, uninitialised: large ones in blocks of earlier caches and results.
Tensor kept_empty_cpu(const Tensor& like, std::vector<int64_t> sizes) {
  return empty_cpu(sizes, like.scalar_type());
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("append_qkv", TORCH_BOX(&append_qkv_cpu));
  m.impl("kept_empty", TORCH_BOX(&kept_empty_cpu));
}

}  // namespace
}  // namespace flexvar
