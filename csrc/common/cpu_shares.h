// Units of work that threads take as they get done: a thread that another program holds up takes
// fewer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace flexvar {

class Shares {
 public:
  Shares(int64_t units, int64_t threads) : units_(units), threads_(threads) {}

  // Calls work(begin, end) with neighbouring units, half of what is left for each thread, until
  // none are.
  template <typename Work>
  void take(Work work) {
    for (int64_t begin = next_.load(); begin < units_;) {
      const int64_t end = begin + std::max<int64_t>(1, (units_ - begin) / (2 * threads_));
      if (!next_.compare_exchange_weak(begin, end)) continue;
      work(begin, end);
      begin = next_.load();
    }
  }

 private:
  std::atomic<int64_t> next_ = 0;
  const int64_t units_, threads_;
};

}  // namespace flexvar
