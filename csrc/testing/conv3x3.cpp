#include <optional>
#include <string>

#include "conv3x3/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

template <class From, class T>
py::array run(const Conv3x3Plan& plan, DeviceMemory& memory, const py::array& x,
              const py::array& weight, const std::optional<py::array>& bias,
              const std::optional<py::array>& residual) {
  Conv3x3PackParams<From, T> pack{};
  pack.plan = plan;
  pack.weight = memory.input<From>("weight", weight);
  pack.column_stride = int64_t{9} * plan.in_channels;
  pack.channel_stride = 9;
  pack.row_stride = 3;
  pack.tap_stride = 1;
  if (bias && bias->dtype().equal(numpy_type<float>())) {
    pack.bias = memory.input<float>("bias", *bias);
  } else if (bias) {
    pack.narrow_bias = memory.input<T>("bias", *bias);
  }
  pack.packed = memory.workspace<T>("packed weight", {plan.weight_elements()});
  pack.packed_bias = memory.workspace<float>("packed bias", {plan.padded_columns()});
  memory.launch(
      conv3x3_pack_kernel<From, T>,
      {{static_cast<unsigned>(conv3x3_pack_blocks(plan)), 1, 1}, {kConvPackThreads, 1, 1}, 0},
      pack);
  memory.fetch(pack.packed);  // every element is written, read or not

  Conv3x3CudaParams<T> params{};
  params.plan = plan;
  params.x = memory.input<T>("x", x);
  params.weight = pack.packed;
  params.bias = pack.packed_bias;
  if (residual) params.residual = memory.input<T>("residual", *residual);
  params.out = memory.output<T>("out", {plan.batch, plan.grid_height * plan.parities,
                                        plan.grid_width * plan.parities, plan.out_channels});
  params.out_in_chunks = conv3x3_in_chunks(params.out, plan.out_channels) &&
                         conv3x3_in_chunks(params.residual, plan.out_channels);
  const LaunchShape shape{{static_cast<unsigned>(plan.blocks()), 1, 1}, {kConvThreads, 1, 1}, 0};
  with_conv_tile(plan.tile, [&]<class Tile>(Tile) {
    conv3x3_in_chunks(params.x, plan.in_channels)
        ? memory.launch(conv3x3_kernel<T, Tile, true>, shape, params)
        : memory.launch(conv3x3_kernel<T, Tile, false>, shape, params);
  });
  return memory.fetch(params.out);
}

// x [B, H, W, C], weight [N, C, 3, 3], bias [N], residual [B, h, w, N] -> [B, h, w, N], as planned
// for a GPU with `multiprocessors`.
py::array conv3x3(const py::array& x, const py::array& weight, const std::optional<py::array>& bias,
                  int resize, const std::optional<py::array>& residual, int multiprocessors,
                  const EmulationOptions& options) {
  DeviceMemory memory(options);
  const Conv3x3Plan plan =
      plan_conv3x3(x.shape(0), x.shape(3), x.shape(1), x.shape(2), weight.shape(0),
                   static_cast<ConvResize>(resize), multiprocessors);
  const bool is_wide = weight.dtype().equal(numpy_type<float>());
  const auto as = [&]<class T>(T) {
    return is_wide ? run<float, T>(plan, memory, x, weight, bias, residual)
                   : run<T, T>(plan, memory, x, weight, bias, residual);
  };
  return x.dtype().equal(numpy_type<__half>()) ? as(__half()) : as(__nv_bfloat16());
}

}  // namespace

EMULATED_BINDINGS(conv3x3, module) {
  module.def("conv3x3", conv3x3);
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
