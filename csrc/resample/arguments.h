// Argument checks that the launchers of resample2d and embed_resample share.
#pragma once

#include <string>

#include "common/tensor_checks.h"
#include "resample/taps.h"
#include "resample/weights.h"

namespace flexvar {

inline ResampleMode parse_resample_mode(const std::string& mode, bool antialias, const char* op) {
  STD_TORCH_CHECK(!antialias || mode == "bilinear", op, ": antialias needs mode bilinear, got ",
                  mode);
  if (mode == "nearest") return ResampleMode::nearest;
  if (mode == "bilinear") {
    return antialias ? ResampleMode::bilinear_antialias : ResampleMode::bilinear;
  }
  if (mode == "bicubic") return ResampleMode::bicubic;
  STD_TORCH_CHECK(mode == "area", op,
                  ": mode must be one of nearest, bilinear, bicubic, area, got ", mode);
  return ResampleMode::area;
}

// Sides are below 2^31, so that products of two fit into 64 bits.
inline void check_side(int64_t side, const char* op, const char* name) {
  STD_TORCH_CHECK(side > 0 && side < (int64_t(1) << 31), op, ": ", name,
                  " must lie in [1, 2^31), got ", side);
}

}  // namespace flexvar
