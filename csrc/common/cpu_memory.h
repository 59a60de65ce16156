// Memory of the CPU launchers: large pages, and scratch that is no tensor.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <new>
#include <utility>

#include "common/tensor_memory.h"

namespace flexvar {

// Large results are mostly fresh from the system, which then hands them out in pages of 2 MiB
// instead of 4 KiB where it does so on request.
inline void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096, kFewest = 4 << 20;
  if (bytes < kFewest) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // or it stays slow
#endif
}
inline void advise_large_pages(torch::stable::Tensor& t) {
  advise_large_pages(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size());
}

// Uninitialised and contiguous, on the CPU.
template <size_t rank>
torch::stable::Tensor empty_cpu(const int64_t (&sizes)[rank], torch::headeronly::ScalarType dtype) {
  torch::stable::Tensor t = empty_contiguous(sizes, dtype, {});
  advise_large_pages(t);
  return t;
}

// Blocks that calls were done with, for the next ones: memory fresh from the system costs a page
// fault every 4 KiB, in small calls more than the arithmetic.
class KeptBlocks {
 public:
  static constexpr size_t kAlignment = 64;

  static KeptBlocks& of_process() {
    static KeptBlocks& blocks = *new KeptBlocks;  // never destroyed: threads may outlive main
    return blocks;
  }

  // The smallest kept block that is large enough, or a new one; `bytes` becomes its size.
  void* take(size_t& bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      Block* best = nullptr;
      for (Block& block : blocks_) {
        if (block.bytes >= bytes && (best == nullptr || block.bytes < best->bytes)) best = &block;
      }
      if (best != nullptr) {
        bytes = std::exchange(best->bytes, 0);
        return std::exchange(best->memory, nullptr);
      }
    }
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* memory = std::aligned_alloc(kAlignment, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    advise_large_pages(memory, bytes);
    return memory;
  }
  // Keeps the block in the place of the smallest, if that is smaller.
  void give(void* memory, size_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      Block& smallest =
          *std::min_element(std::begin(blocks_), std::end(blocks_),
                            [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
      size_t kept = bytes - smallest.bytes;
      for (const Block& block : blocks_) kept += block.bytes;
      if (smallest.bytes < bytes && kept <= kMostBytes) {
        memory = std::exchange(smallest, {memory, bytes}).memory;
      }
    }
    std::free(memory);
  }

 private:
  static constexpr size_t kMostBytes = 32 << 20;  // of all that is kept
  struct Block {
    void* memory = nullptr;
    size_t bytes = 0;
  };

  // Nobody waits for it: not a call beside another, not the child of a fork that it was held in.
  std::mutex mutex_;
  Block blocks_[8];
};

// Uninitialised numbers, aligned for any vector; a few of them lie on the stack.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count <= kFew) return;
    bytes_ = static_cast<size_t>(count) * sizeof(T);
    memory_ = KeptBlocks::of_process().take(bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (memory_ != nullptr) KeptBlocks::of_process().give(memory_, bytes_);
  }
  T* data() { return memory_ != nullptr ? static_cast<T*>(memory_) : few_; }

 private:
  static constexpr int64_t kFew = 8192 / sizeof(T);

  void* memory_ = nullptr;
  size_t bytes_ = 0;
  alignas(KeptBlocks::kAlignment) T few_[kFew];
};

}  // namespace flexvar
