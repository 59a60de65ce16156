// What both launchers check before they touch memory.
#pragma once

#include "common/tensor_checks.h"

namespace flexvar {

inline void check_guided_sample(const Tensor& logits, int64_t top_k, double top_p,
                                const Tensor& seeds, const Tensor& image_ids) {
  constexpr const char* kOp = "guided_sample";
  check_rank(logits, 3, kOp, "logits");
  STD_TORCH_CHECK(is_floating(logits.scalar_type()), kOp, ": logits has an unexpected dtype");
  STD_TORCH_CHECK(logits.size(2) >= 1 && logits.size(2) < INT32_MAX - 16, kOp,
                  ": logits must have 1 <= V < 2^31 - 17, got V = ", logits.size(2));
  STD_TORCH_CHECK(top_k >= 0 && top_p >= 0 && top_p <= 1, kOp, ": top_k or top_p out of range");
  for (const auto& [tensor, name] :
       {std::pair(seeds, "seeds"), std::pair(image_ids, "image_ids")}) {
    check_rank(tensor, 1, kOp, name);
    check_dtype(tensor, ScalarType::Long, kOp, name);
    check_same_device(logits, tensor, kOp, name);
    STD_TORCH_CHECK(tensor.size(0) == logits.size(0), kOp, ": ", name, " must have shape [B]");
  }
}

}  // namespace flexvar
