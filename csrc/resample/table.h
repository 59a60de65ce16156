// Tabulates the windows and weights of weights.h for the CPU kernels.
#pragma once

#include <algorithm>
#include <vector>

#include "resample/taps.h"
#include "resample/weights.h"

namespace flexvar {

template <typename Real>
class ResampleTable {
 public:
  ResampleTable(ResampleMode mode, int64_t in_size, int64_t out_size)
      : ResampleTable(in_size, out_size) {
    const auto axis = make_resample_axis<Real>(mode, in_size, out_size);
    for (int64_t i = 0; i < out_size; ++i) {
      const auto window = resample_window(axis, i);
      start_[i] = window.start;
      count_[i] = window.count;
      stride_ = std::max(stride_, window.count);
    }
    weights_.resize(out_size * stride_);
    for (int64_t i = 0; i < out_size; ++i) {
      const auto window = resample_window(axis, i);
      for (int64_t k = 0; k < window.count; ++k) {
        weights_[i * stride_ + k] = resample_weight(axis, window, k);
      }
    }
  }

  // The adjoint: a sum over the outputs for every input. Their coordinates are consecutive, since
  // windows move one way.
  ResampleTable transposed() const {
    ResampleTable result(out_size_, in_size_);
    const auto each_tap = [&](auto&& visit) {
      for (int64_t i = 0; i < out_size_; ++i) {
        for (int64_t k = 0; k < count_[i]; ++k) visit(i, start_[i] + k, weights_[i * stride_ + k]);
      }
    };
    each_tap([&](int64_t i, int64_t p, Real) {
      if (result.count_[p]++ == 0) result.start_[p] = i;
      result.stride_ = std::max(result.stride_, result.count_[p]);
    });
    result.weights_.resize(in_size_ * result.stride_);
    each_tap([&](int64_t i, int64_t p, Real weight) {
      result.weights_[p * result.stride_ + i - result.start_[p]] = weight;
    });
    return result;
  }

  ResampleTaps<Real> taps() const {
    return {start_.data(), count_.data(), weights_.data(), stride_, in_size_, out_size_};
  }

 private:
  ResampleTable(int64_t in_size, int64_t out_size)
      : in_size_(in_size), out_size_(out_size), stride_(1), start_(out_size), count_(out_size) {}

  int64_t in_size_, out_size_, stride_;
  std::vector<int64_t> start_, count_;
  std::vector<Real> weights_;
};

}  // namespace flexvar
