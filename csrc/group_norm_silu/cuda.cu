#include <torch/csrc/stable/library.h>

#include <bit>
#include <initializer_list>
#include <tuple>

#include "common/cuda_launch.h"
#include "common/tensor_memory.h"
#include "group_norm_silu/arguments.h"
#include "group_norm_silu/kernel.cuh"
#include "group_norm_silu/kernel_backward.cuh"

namespace flexvar {
namespace {

bool aligned(std::initializer_list<const Tensor*> maps) {
  for (const Tensor* t : maps) {
    if (reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 != 0) return false;
  }
  return true;
}

// f<T, vector length>(plan) for the dtype and the layout at hand.
template <class F>
void with_plan(const FeatureMaps& maps, bool is_aligned, const char* op, const F& f) {
  STD_TORCH_CHECK(maps.channels() < (int64_t(1) << 31), op, ": x has too many channels, got ",
                  maps.channels());
  const auto as = [&]<class T>(T) {
    constexpr int vector = 16 / sizeof(T);
    const bool in_vectors = group_norm_in_vectors(maps.channels(), maps.pixels(),
                                                  maps.channels_last(), is_aligned, sizeof(T));
    const GroupNormPlan plan =
        plan_group_norm(maps.images(), maps.channels(), maps.pixels(), maps.groups(),
                        maps.channels_last(), in_vectors ? vector : 1);
    grid_size(maps.images() * maps.channels(), op);
    in_vectors ? f.template operator()<T, vector>(plan) : f.template operator()<T, 1>(plan);
  };
  switch (float_element(maps.dtype(), op, "x")) {
    case FloatElement::float32:
      return as(float());
    case FloatElement::float16:
      return as(__half());
    case FloatElement::bfloat16:
      return as(__nv_bfloat16());
  }
}

Tensor pairs(const FeatureMaps& maps, int64_t rows, int64_t columns) {
  return empty_contiguous({maps.images(), rows, columns, 2}, ScalarType::Float,
                          device_of(maps.tensor()));
}
float2* data(Tensor& pairs) { return static_cast<float2*>(pairs.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> group_norm_silu_cuda(const Tensor& x_in, int64_t num_groups,
                                                const Tensor& weight_in, const Tensor& bias_in,
                                                double eps, bool silu, ScalarType dtype) {
  const char* op = "group_norm_silu";
  const CudaScope scope(x_in);
  FeatureMaps maps(x_in, num_groups, op);
  float_element(dtype, op, "the result");
  if (dtype != maps.dtype()) maps.widen();
  const Tensor& x = maps.tensor();
  const ScalarType element = x.scalar_type();
  // As they are where both are of x's type: a model in 16 bits needs no casts.
  const bool narrow = weight_in.scalar_type() == element && bias_in.scalar_type() == element;
  const ScalarType parameters = narrow ? element : ScalarType::Float;
  const Tensor weight = maps.vector(weight_in, "weight", parameters);
  const Tensor bias = maps.vector(bias_in, "bias", parameters);
  Tensor out = empty_alike(x);
  if (out.numel() == 0) {
    return {as_dtype(out, dtype),
            torch::stable::new_zeros(x, {maps.images(), maps.groups(), 2}, ScalarType::Float)};
  }
  Tensor statistics =
      empty_contiguous({maps.images(), maps.groups(), 2}, ScalarType::Float, device_of(x));
  with_plan(maps, aligned({&x, &out}), op, [&]<class T, int kVector>(const GroupNormPlan& plan) {
    GroupNormSiluCudaParams params{};
    params.x = x.const_data_ptr();
    params.weight = weight.const_data_ptr();
    params.bias = bias.const_data_ptr();
    params.narrow = narrow;
    params.statistics = statistics.mutable_data_ptr<float>();
    params.out = out.mutable_data_ptr();
    params.eps = static_cast<float>(eps);
    params.silu = silu;
    const auto launch = [&](auto kernel, const GroupNormPlan& of, size_t shared_bytes) {
      launch_overlapping(op, scope.stream(), kernel, grid_size(of.blocks(), op),
                         static_cast<unsigned>(of.threads()), shared_bytes, params);
    };
    if constexpr (kVector > 1) {
      if (const auto held = plan_for_held_groups(plan, kVector)) {
        params.plan = *held;
        return launch(&group_norm_silu_held_kernel<T, kVector>, params.plan, 0);
      }
    }
    params.plan = plan_for_moments(plan);
    params.result_plan = plan_for_result(plan);
    const bool whole_groups =
        maps.channels_last() && plan.block_channels % plan.group_channels == 0;
    const int bundle = group_norm_bundle(plan, kVector);
    const int group_bundles = plan.group_channels / (maps.channels_last() ? bundle : 1);
    params.bundle_bits = std::countr_zero(static_cast<unsigned>(bundle));
    params.part_bundles = whole_groups ? group_bundles : 1;
    params.group_parts = whole_groups ? 1 : group_bundles;
    Tensor parts = pairs(maps, maps.groups(), int64_t(params.plan.chunks) * params.group_parts);
    params.parts = data(parts);
    launch(&group_norm_moments_kernel<T, kVector>, params.plan, moments_shared_bytes(params));
    launch(&group_norm_silu_apply_kernel<T, kVector>, params.result_plan,
           apply_shared_bytes(params));
  });
  return {as_dtype(out, dtype), statistics};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cuda(
    const Tensor& grad_in, const Tensor& x_in, int64_t num_groups, const Tensor& weight_in,
    const Tensor& bias_in, const Tensor& statistics_in, bool silu) {
  const char* op = "group_norm_silu_backward";
  const CudaScope scope(x_in);
  FeatureMaps maps(x_in, num_groups, op);
  const ScalarType dtype = maps.dtype();
  if (grad_in.scalar_type() != dtype) maps.widen();
  const Tensor& x = maps.tensor();
  const Tensor grad = as_dtype(maps.like(grad_in, "grad_out"), x.scalar_type());
  const Tensor weight = maps.vector(weight_in, "weight"), bias = maps.vector(bias_in, "bias");
  const Tensor statistics = maps.statistics(statistics_in);
  const int64_t channels = maps.channels();
  Tensor grad_x = empty_alike(x);
  Tensor grad_weight = torch::stable::new_zeros(x, {channels}, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_zeros(x, {channels}, ScalarType::Float);
  if (grad_x.numel() == 0) return {as_dtype(grad_x, dtype), grad_weight, grad_bias};
  with_plan(
      maps, aligned({&x, &grad, &grad_x}), op,
      [&]<class T, int kVector>(const GroupNormPlan& maps_plan) {
        const GroupNormPlan plan = plan_for_sums(maps_plan);
        Tensor parts = pairs(maps, plan.chunks, channels);
        Tensor channel_sums = pairs(maps, channels, 1), group_means = pairs(maps, maps.groups(), 1);
        GroupNormSiluBackwardCudaParams params{};
        params.plan = plan;
        params.grad_out = grad.const_data_ptr();
        params.x = x.const_data_ptr();
        params.weight = weight.const_data_ptr<float>();
        params.bias = bias.const_data_ptr<float>();
        params.statistics = statistics.const_data_ptr<float>();
        params.parts = data(parts);
        params.channel_sums = data(channel_sums);
        params.group_means = data(group_means);
        params.grad_weight = grad_weight.mutable_data_ptr<float>();
        params.grad_bias = grad_bias.mutable_data_ptr<float>();
        params.grad_x = grad_x.mutable_data_ptr();
        params.silu = silu;
        const unsigned blocks = grid_size(plan.blocks(), op);
        const auto groups = static_cast<unsigned>(maps.images() * maps.groups());
        const auto weight_blocks = static_cast<unsigned>((channels + kGroupNormCombineThreads - 1) /
                                                         kGroupNormCombineThreads);
        const auto launch = [&](auto kernel, unsigned grid, unsigned threads) {
          launch_kernel(op, scope.stream(), kernel, grid, threads, 0, params);
        };
        launch(&group_norm_silu_backward_sums_kernel<T, kVector>, blocks, plan.threads());
        launch(&group_norm_silu_backward_means_kernel, groups, kGroupNormCombineThreads);
        launch(&group_norm_silu_backward_weight_kernel, weight_blocks, kGroupNormCombineThreads);
        launch(&group_norm_silu_backward_apply_kernel<T, kVector>, blocks, plan.threads());
      });
  return {as_dtype(grad_x, dtype), grad_weight, grad_bias};
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_cuda));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward_cuda));
}

}  // namespace
}  // namespace flexvar
