#include "layer_norm_modulate/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

FloatElement element_of(const py::array& array) {
  if (array.dtype().equal(numpy_type<float>())) return FloatElement::float32;
  return array.dtype().equal(numpy_type<__half>()) ? FloatElement::float16 : FloatElement::bfloat16;
}

const void* input(DeviceMemory& memory, const char* name, const py::array& array) {
  switch (element_of(array)) {
    case FloatElement::float32:
      return memory.input<float>(name, array);
    case FloatElement::float16:
      return memory.input<__half>(name, array);
    default:
      return memory.input<__nv_bfloat16>(name, array);
  }
}

void* output(DeviceMemory& memory, const char* name, FloatElement element,
             const std::vector<py::ssize_t>& shape) {
  switch (element) {
    case FloatElement::float32:
      return memory.output<float>(name, shape);
    case FloatElement::float16:
      return memory.output<__half>(name, shape);
    default:
      return memory.output<__nv_bfloat16>(name, shape);
  }
}

NormCudaVectors vectors(DeviceMemory& memory, const char* name, const py::array& array) {
  return {memory.input<float>(name, array), array.shape(0) == 1 ? 0 : array.shape(1)};
}

// x, branch [B, L, C]; gate, scale, shift [B or 1, C] -> (y, out), or out without a branch.
py::object forward(const py::array& x, const py::object& branch, const py::array& gate,
                   const py::array& scale, const py::array& shift, float eps,
                   const py::array& out_like, const EmulationOptions& options) {
  DeviceMemory memory(options);
  const std::vector<py::ssize_t> shape(x.shape(), x.shape() + 3);
  LayerNormModulateCudaParams params{};
  params.x = input(memory, "x", x);
  params.scale = vectors(memory, "scale", scale);
  params.shift = vectors(memory, "shift", shift);
  params.x_element = element_of(x);
  params.out_element = element_of(out_like);
  params.out = output(memory, "out", params.out_element, shape);
  params.rows = shape[0] * shape[1];
  params.rows_per_image = shape[1];
  params.columns = static_cast<int>(shape[2]);
  params.eps = eps;
  if (!branch.is_none()) {
    const auto array = branch.cast<py::array>();
    params.branch = input(memory, "branch", array);
    params.branch_element = element_of(array);
    params.gate = vectors(memory, "gate", gate);
    params.y = output(memory, "y", params.x_element, shape);
  }
  const auto kernel = norm_in_vectors(params.columns, options.misalignment == 0)
                          ? layer_norm_modulate_kernel<4>
                          : layer_norm_modulate_kernel<1>;
  memory.launch(kernel,
                {{static_cast<unsigned>(params.rows), 1, 1},
                 {static_cast<unsigned>(norm_threads(params.columns)), 1, 1},
                 0},
                params);
  if (branch.is_none()) return memory.fetch(params.out);
  return py::make_tuple(memory.fetch(params.y), memory.fetch(params.out));
}

// -> (grad_x [B, L, C], grad_scale and grad_shift [B or 1, C])
py::tuple backward(const py::array& grad_out, const py::array& x, const py::array& scale, float eps,
                   const EmulationOptions& options) {
  DeviceMemory memory(options);
  const std::vector<py::ssize_t> shape(x.shape(), x.shape() + 3);
  LayerNormModulateBackwardCudaParams params{};
  params.groups = scale.shape(0);
  params.rows_per_group = shape[0] * shape[1] / params.groups;
  params.parts = (params.rows_per_group + kNormRowsPerSum - 1) / kNormRowsPerSum;
  params.grad_out = input(memory, "grad_out", grad_out);
  params.x = input(memory, "x", x);
  params.scale = vectors(memory, "scale", scale);
  params.grad_element = element_of(grad_out);
  params.x_element = element_of(x);
  params.grad_x = output(memory, "grad_x", params.x_element, shape);
  params.sums = memory.workspace<float>("sums", {2, params.groups * params.parts, shape[2]});
  params.rows_per_image = shape[1];
  params.columns = static_cast<int>(shape[2]);
  params.eps = eps;
  const auto kernel = norm_in_vectors(params.columns, options.misalignment == 0)
                          ? layer_norm_modulate_backward_kernel<4>
                          : layer_norm_modulate_backward_kernel<1>;
  const auto blocks = static_cast<unsigned>(params.groups * params.parts);
  memory.launch(kernel,
                {{blocks, 1, 1}, {static_cast<unsigned>(norm_threads(params.columns)), 1, 1}, 0},
                params);

  const auto sum = [&](const char* name, const float* sums) {
    float* out = memory.output<float>(name, {params.groups, shape[2]});
    const NormSumParams sum_params{sums, out, params.groups, params.parts, params.columns};
    const int64_t threads = params.groups * shape[2];
    const auto sum_blocks =
        static_cast<unsigned>((threads + kNormSumThreads - 1) / kNormSumThreads);
    memory.launch(norm_sum_parts_kernel, {{sum_blocks, 1, 1}, {kNormSumThreads, 1, 1}, 0},
                  sum_params);
    return memory.fetch(out);
  };
  const py::array grad_scale = sum("grad_scale", params.sums);
  const py::array grad_shift =
      sum("grad_shift", params.sums + params.groups * params.parts * shape[2]);
  return py::make_tuple(memory.fetch(params.grad_x), grad_scale, grad_shift);
}

}  // namespace

EMULATED_BINDINGS(layer_norm_modulate, module) {
  module.def("layer_norm_modulate",
             [](const py::array& x, const py::array& scale, const py::array& shift, float eps,
                const py::array& out_like, const EmulationOptions& options) {
               return forward(x, py::none(), scale, scale, shift, eps, out_like, options);
             });
  module.def("residual_layer_norm_modulate", forward);
  module.def("layer_norm_modulate_backward", backward);
}

}  // namespace flexvar::emulation
