#include <torch/csrc/stable/library.h>

#include "common/cuda_launch.h"
#include "conv3x3/arguments.h"
#include "conv3x3/kernel_warpgroup.cuh"

namespace flexvar {
namespace {

// Offsets are of 64 bits; the pixels of an image and the depth of its sums are counted in 32.
void check_size(const Conv3x3Shape& shape) {
  constexpr int64_t kLimit = int64_t{1} << 29;
  STD_TORCH_CHECK(shape.height <= kLimit / shape.width, kConv3x3, ": x has too many pixels, got ",
                  shape.height, " x ", shape.width);
  STD_TORCH_CHECK(shape.in_channels < kLimit / 16 && shape.out_channels < kLimit, kConv3x3,
                  ": too many channels, got ", shape.in_channels, " and ", shape.out_channels);
}

template <class From, class T>
void pack(Conv3x3PackParams<From, T> params, const Tensor& weight,
          const std::optional<Tensor>& bias, cudaStream_t stream) {
  params.weight = static_cast<const From*>(weight.const_data_ptr());
  params.column_stride = weight.stride(0);
  params.channel_stride = weight.stride(1);
  params.row_stride = weight.stride(2);
  params.tap_stride = weight.stride(3);
  if (bias && bias->scalar_type() == ScalarType::Float) {
    params.bias = bias->const_data_ptr<float>();
  } else if (bias) {
    params.narrow_bias = static_cast<const T*>(bias->const_data_ptr());
  }
  launch_kernel(kConv3x3, stream, conv3x3_pack_kernel<From, T>,
                grid_size(conv3x3_pack_blocks(params.plan), kConv3x3), kConvPackThreads, 0, params);
}

// By the smallest of the kernels.
template <class T>
bool has_warpgroups() {
  using Tile = ConvWarpgroupTile<ConvTileSize::warpgroup_small, 3, 1, 3>;
  return takes_threads(conv3x3_warpgroup_kernel<T, Tile>, Tile::kThreads, kConv3x3);
}

template <class T>
void launch(const Conv3x3CudaParams<T>& params, cudaStream_t stream) {
  const unsigned blocks = grid_size(params.plan.blocks(), kConv3x3);
  const auto by_warpgroups = [&]<class Tile>(Tile) {
    constexpr size_t kShared = sizeof(ConvWarpgroupShared<T, Tile>);
    const auto kernel = conv3x3_warpgroup_kernel<T, Tile>;
    allow_shared_memory(kernel, static_cast<int64_t>(kShared), kConv3x3);
    launch_overlapping(kConv3x3, stream, kernel, blocks, Tile::kThreads, kShared, params);
  };
  if (params.plan.by_warpgroups && params.plan.side == 3) {
    with_conv_warpgroup_tile<3>(params.plan.tile, by_warpgroups);
  } else if (params.plan.by_warpgroups) {
    with_conv_warpgroup_tile<2>(params.plan.tile, by_warpgroups);
  } else {
    with_conv_tile(params.plan.tile, [&]<class Tile>(Tile) {
      const auto kernel = conv3x3_in_chunks(params.x, params.plan.in_channels)
                              ? conv3x3_kernel<T, Tile, true>
                              : conv3x3_kernel<T, Tile, false>;
      launch_kernel(kConv3x3, stream, kernel, blocks, kConvThreads, 0, params);
    });
  }
}

template <class T>
void run(const Conv3x3Plan& plan, const Tensor& x, const Tensor& weight,
         const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, Tensor& out,
         cudaStream_t stream) {
  Tensor packed = torch::stable::new_empty(x, {plan.weight_elements()});
  Tensor packed_bias = torch::stable::new_empty(x, {plan.padded_columns()}, ScalarType::Float);
  T* const packed_data = static_cast<T*>(packed.mutable_data_ptr());
  float* const bias_data = packed_bias.mutable_data_ptr<float>();
  if (weight.scalar_type() == ScalarType::Float) {
    Conv3x3PackParams<float, T> params{};
    params.plan = plan;
    params.packed = packed_data;
    params.packed_bias = bias_data;
    pack(params, weight, bias, stream);
  } else {
    Conv3x3PackParams<T, T> params{};
    params.plan = plan;
    params.packed = packed_data;
    params.packed_bias = bias_data;
    pack(params, weight, bias, stream);
  }
  Conv3x3CudaParams<T> params{};
  params.plan = plan;
  params.x = static_cast<const T*>(x.const_data_ptr());
  params.weight = packed_data;
  params.bias = bias_data;
  if (residual) params.residual = static_cast<const T*>(residual->const_data_ptr());
  params.out = static_cast<T*>(out.mutable_data_ptr());
  params.out_in_chunks = conv3x3_in_chunks(params.out, plan.out_channels) &&
                         conv3x3_in_chunks(params.residual, plan.out_channels);
  launch(params, stream);
}

Tensor conv3x3_cuda(const Tensor& x_in, const Tensor& weight, std::optional<Tensor> bias_in,
                    std::string resize, std::optional<Tensor> residual_in) {
  const Conv3x3Shape shape = check_conv3x3(x_in, weight, bias_in, resize, residual_in);
  const bool is_half = x_in.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(is_half || x_in.scalar_type() == ScalarType::BFloat16, kConv3x3,
                  ": x must have dtype float16 or bfloat16 on CUDA");
  STD_TORCH_CHECK(!bias_in || bias_in->scalar_type() == ScalarType::Float ||
                      bias_in->scalar_type() == x_in.scalar_type(),
                  kConv3x3, ": bias must have the dtype of x, or float32");
  check_size(shape);
  const CudaScope scope(x_in);
  Tensor out = torch::stable::new_empty(x_in, shape.out_channels_last());
  if (out.numel() == 0) return channels_first_view(out);
  Tensor x = channels_last(x_in);
  std::optional<Tensor> bias, residual;
  if (bias_in) bias = torch::stable::contiguous(*bias_in);
  if (residual_in) residual = channels_last(*residual_in);
  const Conv3x3Plan plan =
      plan_conv3x3(shape.batch, shape.in_channels, shape.height, shape.width, shape.out_channels,
                   shape.resize, device_attribute(cudaDevAttrMultiProcessorCount, x, kConv3x3),
                   is_half ? has_warpgroups<__half>() : has_warpgroups<__nv_bfloat16>());
  // Whether the slice of a tensor lies at 16 bytes must not decide who multiplies it.
  if (plan.by_warpgroups && !conv3x3_in_chunks(x.const_data_ptr(), shape.in_channels)) {
    x = torch::stable::clone(x);
  }
  if (is_half) {
    run<__half>(plan, x, weight, bias, residual, out, scope.stream());
  } else {
    run<__nv_bfloat16>(plan, x, weight, bias, residual, out, scope.stream());
  }
  return channels_first_view(out);
}

FLEXVAR_LAUNCHERS(m) { m.impl("conv3x3", TORCH_BOX(&conv3x3_cuda)); }

}  // namespace
}  // namespace flexvar
