#pragma once

#include "common/host_device.h"

namespace flexvar {

template <class Real>
constexpr Real kShortestLength = static_cast<Real>(1e-12);

// What scales a vector of this length to length 1; shorter than 1e-12, as F.normalize does.
template <class Real>
FLEXVAR_HOST_DEVICE Real inverse_length(Real length) {
  const Real shortest = kShortestLength<Real>;
  return 1 / (length < shortest ? shortest : length);  // NaN stays NaN
}

}  // namespace flexvar
