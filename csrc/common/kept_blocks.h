// Large blocks of CPU memory that results and calls were done with, kept for the next ones: memory
// fresh from the system costs page faults and the writing of zeros, a fifth of the time of
// generating an image.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>

namespace flexvar {

// Asks for pages of 2 MiB instead of 4 KiB where the system hands them out on request. Whole small
// pages, so that nothing lies between neighbours: a large page must be asked for throughout.
inline void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096, kFewest = 4 << 20;
  if (bytes < kFewest) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // or it stays slow
#endif
}

class KeptBlocks {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kMostBytes = 512 << 20;  // of all that is kept

  struct Block {
    void* memory = nullptr;
    size_t bytes = 0;
  };

  static KeptBlocks& of_process() {
    static KeptBlocks& blocks = *new KeptBlocks;  // never destroyed: threads may outlive main
    return blocks;
  }

  // The smallest kept block that is large enough and not more than twice that, or a new one, for
  // which all others are let go if need be; null where there is no memory.
  Block take(size_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      int best = -1;
      for (int i = 0; i < count_; ++i) {
        if (kept_[i].bytes < bytes || kept_[i].bytes / 2 > bytes) continue;
        if (best < 0 || kept_[i].bytes < kept_[best].bytes) best = i;
      }
      if (best >= 0) return remove(best);
    }
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* memory = std::aligned_alloc(kAlignment, bytes);
    if (memory == nullptr) {
      release();
      memory = std::aligned_alloc(kAlignment, bytes);
    }
    if (memory != nullptr) advise_large_pages(memory, bytes);
    return {memory, bytes};
  }

  // Keeps the block, in place of those that have been kept longest where it would be too much.
  void give(Block block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kMostBytes) return std::free(block.memory);
    while (count_ == kMostBlocks || bytes_ + block.bytes > kMostBytes) std::free(remove(0).memory);
    kept_[count_++] = block;
    bytes_ += block.bytes;
  }

 private:
  static constexpr int kMostBlocks = 256;

  void release() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    while (lock && count_ > 0) std::free(remove(0).memory);
  }

  Block remove(int i) {
    const Block block = kept_[i];
    std::move(kept_ + i + 1, kept_ + count_, kept_ + i);
    --count_;
    bytes_ -= block.bytes;
    return block;
  }

  // Nobody waits for it: not a call beside another, not the child of a fork that it was held in.
  std::mutex mutex_;
  Block kept_[kMostBlocks];  // in the order in which they were given
  int count_ = 0;
  size_t bytes_ = 0;
};

}  // namespace flexvar
