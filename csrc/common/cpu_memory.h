// Memory of the CPU launchers: tensors, and scratch that is no tensor.
#pragma once

#include <cstdint>
#include <new>

#include "common/kept_blocks.h"
#include "common/tensor_memory.h"

namespace flexvar {

// Uninitialised and contiguous, on the CPU.
inline torch::stable::Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                       torch::headeronly::ScalarType dtype) {
  return empty_contiguous(sizes, dtype, {});
}

// Uninitialised numbers, aligned for any vector; a few of them lie on the stack.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count <= kFew) return;
    block_ = KeptBlocks::of_process().take(static_cast<size_t>(count) * sizeof(T));
    if (block_.memory == nullptr) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_.memory != nullptr) KeptBlocks::of_process().give(block_);
  }
  T* data() { return block_.memory != nullptr ? static_cast<T*>(block_.memory) : few_; }

 private:
  static constexpr int64_t kFew = 8192 / sizeof(T);

  KeptBlocks::Block block_;
  alignas(KeptBlocks::kAlignment) T few_[kFew];
};

}  // namespace flexvar
