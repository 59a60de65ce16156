#pragma once

#include <stdint.h>

namespace flexvar::FLEXVAR_ISA {
namespace {

// Asks for memory that is needed next, rows of it, a few lines with every step of the work that
// goes before: in one go they would wait for each other, and the work for them.
class LinesAhead {
 public:
  LinesAhead(const void* memory, int64_t rows, int64_t row_bytes, int64_t stride_bytes,
             int64_t steps)
      : line_(static_cast<const char*>(memory)),
        lines_in_row_((row_bytes + 63) / 64),
        to_next_row_(stride_bytes - lines_in_row_ * 64),
        left_in_row_(lines_in_row_),
        left_(rows * lines_in_row_),
        lines_in_step_((left_ + steps - 1) / steps) {}

  inline __attribute__((always_inline)) void step() {
    for (int64_t i = 0; i < lines_in_step_ && left_ > 0; ++i) {
      __builtin_prefetch(line_, 0, 2);
      line_ += 64;
      --left_;
      if (--left_in_row_ == 0) {
        line_ += to_next_row_;
        left_in_row_ = lines_in_row_;
      }
    }
  }

 private:
  const char* line_;
  int64_t lines_in_row_, to_next_row_, left_in_row_, left_, lines_in_step_;
};

}  // namespace
}  // namespace flexvar::FLEXVAR_ISA
