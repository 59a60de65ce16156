#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/cuda_launch.h"
#include "common/tensor_memory.h"
#include "layer_norm_modulate/arguments.h"
#include "layer_norm_modulate/kernel.cuh"

namespace flexvar {
namespace {

// Whether vectors of four elements can be read from all of them.
bool aligned(std::initializer_list<const Tensor*> tokens,
             std::initializer_list<const ImageVectors*> vectors) {
  const auto multiple = [](const void* data, size_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
  };
  for (const Tensor* t : tokens) {
    if (!multiple(t->const_data_ptr(), 4 * t->element_size())) return false;
  }
  for (const ImageVectors* v : vectors) {
    if (!multiple(v->data(), 16) || v->stride() % 4 != 0) return false;
  }
  return true;
}

NormCudaVectors pointer_to(const ImageVectors& vectors) {
  return {vectors.data(), vectors.stride()};
}

void check_columns(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.size(2) <= kNormMaxColumns, op, ": x must have at most ", kNormMaxColumns,
                  " channels, got ", x.size(2));
}

LayerNormModulateCudaParams forward_params(const Tensor& x, const ImageVectors& scale,
                                           const ImageVectors& shift, Tensor& out, double eps,
                                           const char* op) {
  LayerNormModulateCudaParams params{};
  params.x = x.const_data_ptr();
  params.scale = pointer_to(scale);
  params.shift = pointer_to(shift);
  params.out = out.mutable_data_ptr();
  params.x_element = float_element(x.scalar_type(), op, "x");
  params.out_element = float_element(out.scalar_type(), op, "the result");
  params.rows = grid_size(x.size(0) * x.size(1), op);
  params.rows_per_image = static_cast<unsigned>(x.size(1));
  params.columns = static_cast<int>(x.size(2));
  params.eps = static_cast<float>(eps);
  return params;
}

void launch_forward(const LayerNormModulateCudaParams& params, bool is_aligned, cudaStream_t stream,
                    const char* op) {
  const auto with_vectors = [&]<int kVector>(std::integral_constant<int, kVector>) {
    return params.branch == nullptr ? layer_norm_modulate_kernel<kVector, false>
                                    : layer_norm_modulate_kernel<kVector, true>;
  };
  const auto kernel = norm_in_vectors(params.columns, is_aligned)
                          ? with_vectors(std::integral_constant<int, 4>())
                          : with_vectors(std::integral_constant<int, 1>());
  const unsigned threads = norm_threads(params.columns, kNormItems);
  const unsigned rows = threads == 32 ? kNormRowsPerBlock : 1;
  launch_overlapping(op, stream, kernel, (params.rows + rows - 1) / rows, dim3(threads, rows), 0,
                     params);
}

Tensor layer_norm_modulate_cuda(const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in,
                                double eps, ScalarType dtype) {
  const char* op = "layer_norm_modulate";
  check_tokens(x_in, op);
  check_columns(x_in, op);
  float_element(dtype, op, "the result");
  const CudaScope scope(x_in);
  const Tensor x = as_contiguous(x_in);
  const ImageVectors scale(scale_in, x, op, "scale"), shift(shift_in, x, op, "shift");
  Tensor out = empty_contiguous({x.size(0), x.size(1), x.size(2)}, dtype, device_of(x));
  if (out.numel() == 0) return out;
  launch_forward(forward_params(x, scale, shift, out, eps, op),
                 aligned({&x, &out}, {&scale, &shift}), scope.stream(), op);
  return out;
}

std::tuple<Tensor, Tensor> residual_layer_norm_modulate_cuda(
    const Tensor& x_in, const Tensor& branch_in, const Tensor& gate_in, const Tensor& scale_in,
    const Tensor& shift_in, double eps, ScalarType dtype) {
  const char* op = "residual_layer_norm_modulate";
  check_tokens(x_in, op);
  check_columns(x_in, op);
  float_element(dtype, op, "the result");
  const CudaScope scope(x_in);
  const Tensor x = as_contiguous(x_in);
  const Tensor branch = like_tokens(branch_in, x, op, "branch");
  const ImageVectors gate(gate_in, x, op, "gate"), scale(scale_in, x, op, "scale"),
      shift(shift_in, x, op, "shift");
  Tensor y = empty_contiguous({x.size(0), x.size(1), x.size(2)}, x.scalar_type(), device_of(x));
  Tensor out = empty_contiguous({x.size(0), x.size(1), x.size(2)}, dtype, device_of(x));
  if (out.numel() == 0) return {y, out};
  LayerNormModulateCudaParams params = forward_params(x, scale, shift, out, eps, op);
  params.branch = branch.const_data_ptr();
  params.branch_element = float_element(branch.scalar_type(), op, "branch");
  params.gate = pointer_to(gate);
  params.y = y.mutable_data_ptr();
  launch_forward(params, aligned({&x, &branch, &y, &out}, {&gate, &scale, &shift}), scope.stream(),
                 op);
  return {y, out};
}

LayerNormModulateBackwardCudaParams backward_params(const Tensor& grad, const Tensor& x,
                                                    const ImageVectors& scale, Tensor& grad_x,
                                                    double eps, const char* op) {
  LayerNormModulateBackwardCudaParams params{};
  params.groups = scale.count();
  params.rows_per_group = x.size(0) * x.size(1) / params.groups;
  params.parts = divide_up(params.rows_per_group, int64_t{kNormRowsPerSum});
  params.grad_out = grad.const_data_ptr();
  params.x = x.const_data_ptr();
  params.scale = pointer_to(scale);
  params.grad_x = grad_x.mutable_data_ptr();
  params.grad_element = float_element(grad.scalar_type(), op, "grad_out");
  params.x_element = float_element(x.scalar_type(), op, "x");
  params.rows_per_image = x.size(1);
  params.columns = static_cast<int>(x.size(2));
  params.eps = static_cast<float>(eps);
  return params;
}

// vectors: the gradients of scale, of shift and, if there is a branch, of gate.
void launch_backward(LayerNormModulateBackwardCudaParams params, bool is_aligned,
                     std::initializer_list<Tensor*> vectors, const CudaScope& scope,
                     const char* op) {
  const int64_t outs = static_cast<int64_t>(vectors.size()), blocks = params.groups * params.parts;
  Tensor sums = empty_contiguous({outs, blocks, params.columns}, ScalarType::Float,
                                 device_of(**vectors.begin()));
  params.sums = sums.mutable_data_ptr<float>();
  const auto with_vectors = [&]<int kVector>(std::integral_constant<int, kVector>) {
    return params.branch == nullptr ? layer_norm_modulate_backward_kernel<kVector, false>
                                    : layer_norm_modulate_backward_kernel<kVector, true>;
  };
  const auto kernel = norm_in_vectors(params.columns, is_aligned && aligned({&sums}, {}))
                          ? with_vectors(std::integral_constant<int, 4>())
                          : with_vectors(std::integral_constant<int, 1>());
  const int64_t shared = outs * params.columns * static_cast<int64_t>(sizeof(float));
  // 48 KB without leave hold what a kernel declares itself, too.
  allow_shared_memory(kernel, shared + static_cast<int64_t>(sizeof(NormStorage<float4>)), op);
  launch_kernel(op, scope.stream(), kernel, grid_size(blocks, op),
                norm_threads(params.columns, kNormBackwardItems), static_cast<size_t>(shared),
                params);

  NormSumParams sum{params.sums, {}, params.groups, params.parts, params.columns};
  std::transform(vectors.begin(), vectors.end(), sum.out,
                 [](Tensor* vector) { return vector->mutable_data_ptr<float>(); });
  const int64_t threads = params.groups * params.columns;
  const dim3 grid(grid_size(divide_up(threads, int64_t{kNormSumThreads}), op),
                  static_cast<unsigned>(outs));
  launch_kernel(op, scope.stream(), norm_sum_parts_kernel, grid, kNormSumThreads, 0, sum);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward_cuda(const Tensor& grad_in,
                                                                     const Tensor& x_in,
                                                                     const Tensor& scale_in,
                                                                     double eps) {
  const char* op = "layer_norm_modulate_backward";
  check_tokens(x_in, op);
  check_columns(x_in, op);
  const CudaScope scope(x_in);
  const Tensor x = as_contiguous(x_in);
  const Tensor grad = like_tokens(grad_in, x, op, "grad_out");
  const ImageVectors scale(scale_in, x, op, "scale");
  Tensor grad_x =
      empty_contiguous({x.size(0), x.size(1), x.size(2)}, x.scalar_type(), device_of(x));
  Tensor grad_scale = zero_vectors(x, scale.count()), grad_shift = zero_vectors(x, scale.count());
  if (grad_x.numel() > 0) {
    launch_backward(backward_params(grad, x, scale, grad_x, eps, op),
                    aligned({&x, &grad, &grad_x}, {&scale}), {&grad_scale, &grad_shift}, scope, op);
  }
  return {grad_x, grad_scale, grad_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_layer_norm_modulate_backward_cuda(
    const Tensor& grad_y_in, const Tensor& grad_in, const Tensor& y_in, const Tensor& branch_in,
    const Tensor& gate_in, const Tensor& scale_in, double eps) {
  const char* op = "residual_layer_norm_modulate_backward";
  check_tokens(y_in, op);
  check_columns(y_in, op);
  const CudaScope scope(y_in);
  const ResidualGradientInputs given(grad_y_in, grad_in, y_in, branch_in, gate_in, scale_in, op);
  const auto& [y, grad_y, grad, branch, gate, scale] = given;
  const std::vector<int64_t> shape{y.size(0), y.size(1), y.size(2)};
  Tensor grad_x = empty_contiguous(shape, y.scalar_type(), device_of(y));
  Tensor grad_branch = empty_contiguous(shape, branch.scalar_type(), device_of(y));
  Tensor grad_gate = zero_vectors(y, scale.count()), grad_scale = zero_vectors(y, scale.count()),
         grad_shift = zero_vectors(y, scale.count());
  if (grad_x.numel() > 0) {
    LayerNormModulateBackwardCudaParams params = backward_params(grad, y, scale, grad_x, eps, op);
    params.grad_y = grad_y.const_data_ptr();
    params.branch = branch.const_data_ptr();
    params.gate = pointer_to(gate);
    params.grad_branch = grad_branch.mutable_data_ptr();
    params.grad_y_element = float_element(grad_y.scalar_type(), op, "grad_y");
    params.branch_element = float_element(branch.scalar_type(), op, "branch");
    launch_backward(params,
                    aligned({&y, &grad, &grad_y, &branch, &grad_x, &grad_branch}, {&gate, &scale}),
                    {&grad_scale, &grad_shift, &grad_gate}, scope, op);
  }
  return {grad_x, grad_branch, grad_gate, grad_scale, grad_shift};
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate_cuda));
  m.impl("residual_layer_norm_modulate", TORCH_BOX(&residual_layer_norm_modulate_cuda));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward_cuda));
  m.impl("residual_layer_norm_modulate_backward",
         TORCH_BOX(&residual_layer_norm_modulate_backward_cuda));
}

}  // namespace
}  // namespace flexvar
