#pragma once

namespace flexvar {

// |code| is clamped from below by this when codes are normalised, as F.normalize does.
constexpr double kMinCodeNorm = 1e-12;

}  // namespace flexvar
