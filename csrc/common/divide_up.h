#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace flexvar {

FLEXVAR_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flexvar
