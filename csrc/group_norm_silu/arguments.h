// What both launchers of group_norm_silu make of their arguments.
#pragma once

#include "common/float_element.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"

namespace flexvar {

// Feature maps [images, channels, height, width], in memory either so or with the channels last.
// flexvar_ext/group_norm_silu.py tells torch the same of the result.
class FeatureMaps {
 public:
  FeatureMaps(const Tensor& given, int64_t num_groups, const char* op)
      : op_(op),
        channels_last_(given.dim() == 4 && !given.is_contiguous() && given.stride(1) == 1),
        groups_(num_groups) {
    check_rank(given, 4, op, "x");
    float_element(given.scalar_type(), op, "x");
    STD_TORCH_CHECK(given.size(1) > 0, op, ": x must have at least one channel");
    STD_TORCH_CHECK(num_groups > 0 && given.size(1) % num_groups == 0, op,
                    ": num_groups must divide the channels of x, ", given.size(1), ", got ",
                    num_groups);
    tensor_ = in_format(given);
  }

  const Tensor& tensor() const { return tensor_; }
  ScalarType dtype() const { return tensor_.scalar_type(); }
  bool channels_last() const { return channels_last_; }
  int64_t images() const { return tensor_.size(0); }
  int64_t channels() const { return tensor_.size(1); }
  int64_t groups() const { return groups_; }
  int64_t pixels() const { return tensor_.size(2) * tensor_.size(3); }

  // For results in another dtype than that of x: float32 holds all of them.
  void widen() { tensor_ = as_dtype(tensor_, ScalarType::Float); }

  // Of the shape of x, in its memory format.
  Tensor like(const Tensor& given, const char* name) const {
    check_rank(given, 4, op_, name);
    check_same_device(tensor_, given, op_, name);
    float_element(given.scalar_type(), op_, name);
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(given.size(i) == tensor_.size(i), op_, ": ", name,
                      " must have the shape of x");
    }
    return in_format(given);
  }

  // Weight or bias: [channels], contiguous and in this dtype.
  Tensor vector(const Tensor& given, const char* name, ScalarType dtype = ScalarType::Float) const {
    check_rank(given, 1, op_, name);
    check_same_device(tensor_, given, op_, name);
    float_element(given.scalar_type(), op_, name);
    STD_TORCH_CHECK(given.size(0) == channels(), op_, ": ", name, " must have shape [C]");
    return as_contiguous(as_dtype(given, dtype));
  }

  // The forward's second result: mean and reciprocal deviation, float32 [images, groups, 2].
  Tensor statistics(const Tensor& given) const {
    check_rank(given, 3, op_, "statistics");
    check_same_device(tensor_, given, op_, "statistics");
    check_dtype(given, ScalarType::Float, op_, "statistics");
    STD_TORCH_CHECK(given.size(0) == images() && given.size(1) == groups_ && given.size(2) == 2,
                    op_, ": statistics must have shape [B, num_groups, 2]");
    return as_contiguous(given);
  }

 private:
  Tensor in_format(const Tensor& t) const {
    return channels_last_ ? as_channels_last(t) : as_contiguous(t);
  }

  const char* op_;
  bool channels_last_;
  int64_t groups_;
  Tensor tensor_;
};

}  // namespace flexvar
