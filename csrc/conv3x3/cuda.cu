#include <torch/csrc/stable/library.h>

#include "common/cuda_launch.h"
#include "common/tensor_memory.h"
#include "conv3x3/arguments.h"
#include "conv3x3/kernel_warpgroup.cuh"

namespace flexvar {
namespace {

// Offsets are of 64 bits; the pixels of an image and the depth of its sums are counted in 32.
constexpr int64_t kConvLimit = int64_t{1} << 29;
void check_pixels(const Conv3x3Shape& shape) {
  STD_TORCH_CHECK(shape.height <= kConvLimit / shape.width, kConv3x3,
                  ": x has too many pixels, got ", shape.height, " x ", shape.width);
}
void check_channels(const Tensor& weight) {
  STD_TORCH_CHECK(weight.size(1) < kConvLimit / 16 && weight.size(0) < kConvLimit, kConv3x3,
                  ": too many channels, got ", weight.size(1), " and ", weight.size(0));
}

// The packed weight, and behind it the packed bias, in one tensor of x's dtype.
int64_t packed_elements(const Conv3x3Plan& plan) {
  constexpr int64_t kOfBias = sizeof(float) / 2;
  return plan.weight_elements() + plan.padded_columns() * kOfBias;
}

template <class From, class T>
void pack(const Conv3x3Plan& plan, const Tensor& weight, const std::optional<Tensor>& bias,
          Tensor& packed, cudaStream_t stream) {
  Conv3x3PackParams<From, T> params{};
  params.plan = plan;
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
  params.packed = static_cast<T*>(packed.mutable_data_ptr());
  params.packed_bias = reinterpret_cast<float*>(params.packed + plan.weight_elements());
  launch_kernel(kConv3x3, stream, conv3x3_pack_kernel<From, T>,
                grid_size(conv3x3_pack_blocks(plan), kConv3x3), kConvPackThreads, 0, params);
}

// Within a CudaScope of the weight.
Tensor pack(const Conv3x3Plan& plan, const Tensor& weight, const std::optional<Tensor>& bias_in,
            ScalarType dtype, cudaStream_t stream) {
  Tensor packed = empty_contiguous({packed_elements(plan)}, dtype, device_of(weight));
  std::optional<Tensor> bias;
  if (bias_in) bias = as_contiguous(*bias_in);
  const auto as = [&]<class T>(T) {
    if (weight.scalar_type() == ScalarType::Float) {
      pack<float, T>(plan, weight, bias, packed, stream);
    } else {
      pack<T, T>(plan, weight, bias, packed, stream);
    }
  };
  dtype == ScalarType::Half ? as(__half()) : as(__nv_bfloat16());
  return packed;
}

// By the smallest of the kernels.
bool has_warpgroups() {
  using Tile = ConvWarpgroupTile<ConvTileSize::warpgroup_small, 3, 1, 3>;
  return takes_threads(conv3x3_warpgroup_kernel<__half, Tile>, Tile::kThreads, kConv3x3);
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
void run(const Conv3x3Plan& plan, const Tensor& x, const Tensor& packed,
         const std::optional<Tensor>& residual, Tensor& out, cudaStream_t stream) {
  Conv3x3CudaParams<T> params{};
  params.plan = plan;
  params.x = static_cast<const T*>(x.const_data_ptr());
  params.weight = static_cast<const T*>(packed.const_data_ptr());
  params.bias = reinterpret_cast<const float*>(params.weight + plan.weight_elements());
  if (residual) params.residual = static_cast<const T*>(residual->const_data_ptr());
  params.out = static_cast<T*>(out.mutable_data_ptr());
  params.out_in_chunks = conv3x3_in_chunks(params.out, plan.out_channels) &&
                         conv3x3_in_chunks(params.residual, plan.out_channels);
  launch(params, stream);
}

void check_dtypes(ScalarType dtype, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, kConv3x3,
                  ": x must have dtype float16 or bfloat16 on CUDA");
  STD_TORCH_CHECK(!bias || bias->scalar_type() == ScalarType::Float || bias->scalar_type() == dtype,
                  kConv3x3, ": bias must have the dtype of x, or float32");
}

Tensor conv3x3_cuda(const Tensor& x_in, const Tensor& weight, std::optional<Tensor> bias,
                    std::string resize, std::optional<Tensor> residual_in,
                    std::optional<Tensor> packed) {
  const Conv3x3Shape shape = check_conv3x3(x_in, weight, bias, resize, residual_in);
  const ScalarType dtype = x_in.scalar_type();
  check_dtypes(dtype, bias);
  check_pixels(shape);
  check_channels(weight);
  const CudaScope scope(x_in);
  const Conv3x3Plan plan = plan_conv3x3(
      shape.batch, shape.in_channels, shape.height, shape.width, shape.out_channels, shape.resize,
      device_attribute(cudaDevAttrMultiProcessorCount, kConv3x3), has_warpgroups());
  if (packed) {
    check_same_device(x_in, *packed, kConv3x3, "packed");
    check_dtype(*packed, dtype, kConv3x3, "packed");
    STD_TORCH_CHECK(packed->numel() == packed_elements(plan) && packed->is_contiguous() &&
                        reinterpret_cast<uintptr_t>(packed->const_data_ptr()) % 16 == 0,
                    kConv3x3, ": packed must be what conv3x3_pack made of the weight");
  }
  const auto sizes = shape.result_sizes();
  Tensor out =
      empty_strided(sizes, channels_last_strides(sizes), x_in.scalar_type(), device_of(x_in));
  if (out.numel() == 0) return out;
  Tensor x = as_channels_last(x_in);
  std::optional<Tensor> residual;
  if (residual_in) residual = as_channels_last(*residual_in);
  // Whether the slice of a tensor lies at 16 bytes must not decide who multiplies it.
  if (plan.by_warpgroups && !conv3x3_in_chunks(x.const_data_ptr(), shape.in_channels)) {
    x = torch::stable::clone(x);
  }
  if (!packed) packed = pack(plan, weight, bias, dtype, scope.stream());
  if (dtype == ScalarType::Half) {
    run<__half>(plan, x, *packed, residual, out, scope.stream());
  } else {
    run<__nv_bfloat16>(plan, x, *packed, residual, out, scope.stream());
  }
  return out;
}

Tensor conv3x3_pack_cuda(const Tensor& weight, std::optional<Tensor> bias, std::string resize,
                         ScalarType dtype) {
  check_weight(weight, dtype, bias);
  check_dtypes(dtype, bias);
  check_channels(weight);
  const CudaScope scope(weight);
  // One that any x has: only the tiles depend on it.
  const Conv3x3Plan plan = plan_conv3x3(1, weight.size(1), 2, 2, weight.size(0),
                                        parse_conv_resize(resize), 1, has_warpgroups());
  return pack(plan, weight, bias, dtype, scope.stream());
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3_cuda));
  m.impl("conv3x3_pack", TORCH_BOX(&conv3x3_pack_cuda));
}

}  // namespace
}  // namespace flexvar
