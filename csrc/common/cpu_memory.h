// Memory of the CPU launchers: tensors, and scratch that is no tensor.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <new>

#include "common/kept_blocks.h"
#include "common/tensor_memory.h"

namespace flexvar {

// The bytes of contiguous numbers, or 0 where there are more than memory could hold.
inline size_t bytes_of(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       torch::headeronly::ScalarType dtype) {
  size_t bytes = aoti_torch_dtype_element_size(dtype_code(dtype));
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) return 0;
  }
  return bytes <= PTRDIFF_MAX ? bytes : 0;
}

// Uninitialised, in a kept block if it is large; the strides leave no holes.
inline torch::stable::Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                       torch::headeronly::IntHeaderOnlyArrayRef strides,
                                       torch::headeronly::ScalarType dtype) {
  constexpr size_t kFewestBytesKept = 32 << 10;  // malloc may fetch pages anew every time from here
  constexpr int32_t kNoIndex = -1;
  const size_t bytes = bytes_of(sizes, dtype);
  if (bytes < kFewestBytesKept) return empty_strided(sizes, strides, dtype, {});

  const KeptBlocks::Block block = KeptBlocks::of_process().take(bytes);
  AtenTensorHandle handle{};
  AOTITorchError error = AOTI_TORCH_FAILURE;
  if (block.memory != nullptr) {
    const auto give_back = [](void* memory, void* bytes_of_block) {
      KeptBlocks::of_process().give({memory, reinterpret_cast<size_t>(bytes_of_block)});
    };
    error = torch_from_blob(block.memory, static_cast<int64_t>(sizes.size()), sizes.data(),
                            strides.data(), 0, dtype_code(dtype), aoti_torch_device_type_cpu(),
                            kNoIndex, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back,
                            reinterpret_cast<void*>(block.bytes));
    if (error != AOTI_TORCH_SUCCESS) KeptBlocks::of_process().give(block);
  }
  return made_by_torch(error, handle, sizes);
}

inline torch::stable::Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                       torch::headeronly::ScalarType dtype) {
  return empty_cpu(sizes, contiguous_strides(sizes), dtype);
}

// With the strides of t, whose elements fill their memory.
inline torch::stable::Tensor empty_cpu_alike(const torch::stable::Tensor& t) {
  return empty_cpu(t.sizes(), t.strides(), t.scalar_type());
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
