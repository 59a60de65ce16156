#include <string>

#include "conv3x3/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {

EMULATED_BINDINGS(conv3x3, module) {
  module.def("conv3x3_tile", [](int64_t batch, int64_t in_channels, int64_t height, int64_t width,
                                int64_t out_channels, int resize, int multiprocessors) {
    const Conv3x3Plan plan = plan_conv3x3(batch, in_channels, height, width, out_channels,
                                          static_cast<ConvResize>(resize), multiprocessors);
    return std::string(plan.tile == ConvTileSize::large   ? "large"
                       : plan.tile == ConvTileSize::small ? "small"
                                                          : "narrow");
  });
}

}  // namespace flexvar::emulation
