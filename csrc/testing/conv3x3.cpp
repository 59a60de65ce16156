#include <string>

#include "conv3x3/kernel_warpgroup.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {

namespace {

template <int kSide>
void add_shared_bytes(py::dict& bytes) {
  using enum ConvTileSize;
  for (const ConvTileSize size : {warpgroup_large, warpgroup, warpgroup_small}) {
    with_conv_warpgroup_tile<kSide>(size, [&]<class Tile>(Tile) {
      bytes[py::make_tuple(static_cast<int>(size), kSide)] =
          sizeof(ConvWarpgroupShared<__half, Tile>);
    });
  }
}

}  // namespace

EMULATED_BINDINGS(conv3x3, module) {
  // Dynamic shared memory of a block by warpgroups: {(tile, taps a side): bytes}.
  module.def("conv3x3_shared_bytes", [] {
    py::dict bytes;
    add_shared_bytes<2>(bytes);
    add_shared_bytes<3>(bytes);
    return bytes;
  });
  module.def("conv3x3_tile",
             [](int64_t batch, int64_t in_channels, int64_t height, int64_t width,
                int64_t out_channels, int resize, int multiprocessors, bool warpgroups) {
               const Conv3x3Plan plan =
                   plan_conv3x3(batch, in_channels, height, width, out_channels,
                                static_cast<ConvResize>(resize), multiprocessors, warpgroups);
               constexpr const char* kNames[] = {"large",           "small",     "narrow",
                                                 "warpgroup_large", "warpgroup", "warpgroup_small"};
               return std::string(kNames[static_cast<int>(plan.tile)]);
             });
}

}  // namespace flexvar::emulation
