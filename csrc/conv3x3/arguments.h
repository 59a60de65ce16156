// What the launchers of CPU and CUDA check alike, and the layout that both work in.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "conv3x3/resize.h"

namespace flexvar {

constexpr const char* kConv3x3 = "conv3x3";

struct Conv3x3Shape {
  ConvResize resize;
  int64_t batch, in_channels, height, width, out_channels, out_height, out_width;

  std::array<int64_t, 4> result_sizes() const {
    return {batch, out_channels, out_height, out_width};
  }
};

inline ConvResize parse_conv_resize(const std::string& name) {
  if (name == "down") return ConvResize::down;
  if (name == "up") return ConvResize::up;
  STD_TORCH_CHECK(name == "none", kConv3x3, ": resize must be none, down or up, got ", name);
  return ConvResize::none;
}

inline void check_weight(const Tensor& weight, ScalarType dtype,
                         const std::optional<Tensor>& bias) {
  check_rank(weight, 4, kConv3x3, "weight");
  STD_TORCH_CHECK(
      weight.size(0) > 0 && weight.size(1) > 0 && weight.size(2) == 3 && weight.size(3) == 3,
      kConv3x3, ": weight must be [N, C, 3, 3]");
  STD_TORCH_CHECK(weight.scalar_type() == dtype || weight.scalar_type() == ScalarType::Float,
                  kConv3x3, ": weight must have the dtype of x, or float32");
  if (bias) {
    check_rank(*bias, 1, kConv3x3, "bias");
    check_same_device(weight, *bias, kConv3x3, "bias");
    STD_TORCH_CHECK(bias->size(0) == weight.size(0), kConv3x3, ": bias must be [N]");
  }
}

inline Conv3x3Shape check_conv3x3(const Tensor& x, const Tensor& weight,
                                  const std::optional<Tensor>& bias, const std::string& resize,
                                  const std::optional<Tensor>& residual) {
  check_rank(x, 4, kConv3x3, "x");
  check_weight(weight, x.scalar_type(), bias);
  check_same_device(x, weight, kConv3x3, "weight");
  STD_TORCH_CHECK(weight.size(1) == x.size(1), kConv3x3, ": weight must be [N, C, 3, 3]");
  Conv3x3Shape shape{};
  shape.resize = parse_conv_resize(resize);
  shape.batch = x.size(0);
  shape.in_channels = x.size(1);
  shape.height = x.size(2);
  shape.width = x.size(3);
  shape.out_channels = weight.size(0);
  const bool down = shape.resize == ConvResize::down, up = shape.resize == ConvResize::up;
  const int64_t fewest = down ? 2 : 1;
  STD_TORCH_CHECK(shape.height >= fewest && shape.width >= fewest, kConv3x3,
                  ": x must be at least ", fewest, " x ", fewest, " pixels");
  shape.out_height = down ? shape.height / 2 : up ? 2 * shape.height : shape.height;
  shape.out_width = down ? shape.width / 2 : up ? 2 * shape.width : shape.width;
  if (residual) {
    check_rank(*residual, 4, kConv3x3, "residual");
    check_same_device(x, *residual, kConv3x3, "residual");
    check_dtype(*residual, x.scalar_type(), kConv3x3, "residual");
    STD_TORCH_CHECK(residual->size(0) == shape.batch && residual->size(1) == shape.out_channels &&
                        residual->size(2) == shape.out_height &&
                        residual->size(3) == shape.out_width,
                    kConv3x3, ": residual must have the shape of the result");
  }
  return shape;
}

}  // namespace flexvar
