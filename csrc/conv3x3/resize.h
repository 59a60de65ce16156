#pragma once

namespace flexvar {

enum class ConvResize : int { none, down, up };

}  // namespace flexvar
