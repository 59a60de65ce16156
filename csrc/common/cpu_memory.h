// Memory of the CPU launchers. torch::stable's empty, contiguous and to look their op up by name
// and box its arguments, about a microsecond each: as long as a small call's arithmetic. So here
// tensors are allocated past the dispatcher, scratch is no tensor, and nothing is asked to convert
// what is as it should be.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace flexvar {

// Uninitialised and contiguous, on the CPU.
template <size_t rank>
torch::stable::Tensor empty_cpu(const int64_t (&sizes)[rank], torch::headeronly::ScalarType dtype) {
  int64_t strides[rank], stride = 1;
  for (size_t i = rank; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  const AOTITorchError error = aoti_torch_empty_strided(
      static_cast<int64_t>(rank), sizes, strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "can't allocate memory for a tensor of ", stride,
                  " elements");
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor contiguous_cpu(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Uninitialised numbers, aligned for any vector; a few of them lie on the stack.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count > kFew) memory_.reset(allocate(count));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return memory_ ? memory_.get() : few_; }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr int64_t kFew = 8192 / sizeof(T);
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };

  static T* allocate(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    void* memory =
        std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (memory == nullptr) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }

  std::unique_ptr<T[], Free> memory_;
  alignas(kAlignment) T few_[kFew];
};

}  // namespace flexvar
