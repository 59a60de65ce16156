#include "group_norm_silu/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

// f<T, vector length>(plan), as cuda.cu chooses them. x: [B, C, H, W], or [B, H, W, C].
template <class F>
py::tuple with_plan(const py::array& x, int64_t groups, bool channels_last,
                    const EmulationOptions& options, const F& f) {
  const int64_t images = x.shape(0), channels = x.shape(channels_last ? 3 : 1);
  const int64_t pixels = channels_last ? x.shape(1) * x.shape(2) : x.shape(2) * x.shape(3);
  const auto as = [&]<class T>(T) {
    constexpr int vector = 16 / sizeof(T);
    const bool in_vectors = group_norm_in_vectors(channels, pixels, channels_last,
                                                  options.misalignment == 0, sizeof(T));
    const GroupNormPlan plan =
        plan_group_norm(images, channels, pixels, groups, channels_last, in_vectors ? vector : 1);
    return in_vectors ? f.template operator()<T, vector>(plan) : f.template operator()<T, 1>(plan);
  };
  if (x.dtype().equal(numpy_type<float>())) return as(float());
  return x.dtype().equal(numpy_type<__half>()) ? as(__half()) : as(__nv_bfloat16());
}

LaunchShape shape_of(int64_t blocks, int threads) {
  return {{static_cast<unsigned>(blocks), 1, 1}, {static_cast<unsigned>(threads), 1, 1}, 0};
}

std::vector<py::ssize_t> shape_of(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

// -> (out, as x; statistics [images, groups, 2])
py::tuple forward(const py::array& x, int64_t groups, const py::array& weight,
                  const py::array& bias, float eps, bool silu, bool channels_last,
                  const EmulationOptions& options) {
  DeviceMemory memory(options);
  return with_plan(
      x, groups, channels_last, options, [&]<class T, int kVector>(const GroupNormPlan& plan) {
        GroupNormSiluCudaParams params{};
        params.plan = plan;
        params.x = memory.input<T>("x", x);
        params.weight = memory.input<float>("weight", weight);
        params.bias = memory.input<float>("bias", bias);
        float* parts =
            memory.workspace<float>("parts", {plan.images, plan.chunks, plan.channels, 2});
        params.parts = reinterpret_cast<float2*>(parts);
        params.statistics = memory.workspace<float>("statistics", {plan.images, groups, 2});
        params.out = memory.output<T>("out", shape_of(x));
        params.eps = eps;
        params.silu = silu;
        memory.launch(group_norm_moments_kernel<T, kVector>,
                      shape_of(plan.blocks(), plan.threads()), params);
        memory.launch(group_norm_statistics_kernel,
                      shape_of(plan.images * groups, kGroupNormCombineThreads), params);
        memory.launch(group_norm_silu_apply_kernel<T, kVector>,
                      shape_of(plan.blocks(), plan.threads()), params);
        return py::make_tuple(memory.fetch(params.out), memory.fetch(params.statistics));
      });
}

// -> (grad_x, as x; grad_weight and grad_bias [channels])
py::tuple backward(const py::array& grad_out, const py::array& x, int64_t groups,
                   const py::array& weight, const py::array& bias, const py::array& statistics,
                   bool silu, bool channels_last, const EmulationOptions& options) {
  DeviceMemory memory(options);
  return with_plan(
      x, groups, channels_last, options, [&]<class T, int kVector>(const GroupNormPlan& plan) {
        GroupNormSiluBackwardCudaParams params{};
        params.plan = plan;
        params.grad_out = memory.input<T>("grad_out", grad_out);
        params.x = memory.input<T>("x", x);
        params.weight = memory.input<float>("weight", weight);
        params.bias = memory.input<float>("bias", bias);
        params.statistics = memory.input<float>("statistics", statistics);
        const auto workspace = [&](const char* name, py::ssize_t rows, py::ssize_t columns) {
          return reinterpret_cast<float2*>(
              memory.workspace<float>(name, {plan.images, rows, columns, 2}));
        };
        params.parts = workspace("parts", plan.chunks, plan.channels);
        params.channel_sums = workspace("channel_sums", plan.channels, 1);
        params.group_means = workspace("group_means", groups, 1);
        params.grad_weight = memory.output<float>("grad_weight", {plan.channels});
        params.grad_bias = memory.output<float>("grad_bias", {plan.channels});
        params.grad_x = memory.output<T>("grad_x", shape_of(x));
        params.silu = silu;
        memory.launch(group_norm_silu_backward_sums_kernel<T, kVector>,
                      shape_of(plan.blocks(), plan.threads()), params);
        memory.launch(group_norm_silu_backward_means_kernel,
                      shape_of(plan.images * groups, kGroupNormCombineThreads), params);
        memory.launch(
            group_norm_silu_backward_weight_kernel,
            shape_of((plan.channels + kGroupNormCombineThreads - 1) / kGroupNormCombineThreads,
                     kGroupNormCombineThreads),
            params);
        memory.launch(group_norm_silu_backward_apply_kernel<T, kVector>,
                      shape_of(plan.blocks(), plan.threads()), params);
        return py::make_tuple(memory.fetch(params.grad_x), memory.fetch(params.grad_weight),
                              memory.fetch(params.grad_bias));
      });
}

}  // namespace

EMULATED_BINDINGS(group_norm_silu, module) {
  module.def("group_norm_silu", forward);
  module.def("group_norm_silu_backward", backward);
}

}  // namespace flexvar::emulation
