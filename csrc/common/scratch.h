#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace flexvar {

// Memory for the kernels, aligned to a cache line for as long as this lives.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : owner_(torch::stable::empty({bytes + 64}, torch::headeronly::ScalarType::Byte)),
        begin_(reinterpret_cast<char*>(
            (reinterpret_cast<uintptr_t>(owner_.mutable_data_ptr()) + 63) / 64 * 64)) {}
  char* begin() const { return begin_; }

 private:
  torch::stable::Tensor owner_;
  char* begin_;
};

}  // namespace flexvar
