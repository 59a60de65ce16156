#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <tuple>
#include <type_traits>

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
  const int64_t columns = x.size(2), rows = x.size(0) * x.size(1), groups = scale.count();
  Tensor grad_x = empty_contiguous({x.size(0), x.size(1), columns}, x.scalar_type(), device_of(x));
  Tensor grad_scale = torch::stable::new_zeros(x, {groups, 1, columns}, ScalarType::Float);
  Tensor grad_shift = torch::stable::new_zeros(x, {groups, 1, columns}, ScalarType::Float);
  if (grad_x.numel() == 0) return {grad_x, grad_scale, grad_shift};

  LayerNormModulateBackwardCudaParams params{};
  params.groups = groups;
  params.rows_per_group = rows / groups;
  params.parts = (params.rows_per_group + kNormRowsPerSum - 1) / kNormRowsPerSum;
  Tensor sums =
      empty_contiguous({2, groups * params.parts, columns}, ScalarType::Float, device_of(x));
  params.grad_out = grad.const_data_ptr();
  params.x = x.const_data_ptr();
  params.scale = pointer_to(scale);
  params.grad_x = grad_x.mutable_data_ptr();
  params.sums = sums.mutable_data_ptr<float>();
  params.grad_element = float_element(grad.scalar_type(), op, "grad_out");
  params.x_element = float_element(x.scalar_type(), op, "x");
  params.rows_per_image = x.size(1);
  params.columns = static_cast<int>(columns);
  params.eps = static_cast<float>(eps);
  const auto kernel = norm_in_vectors(columns, aligned({&x, &grad, &grad_x, &sums}, {&scale}))
                          ? layer_norm_modulate_backward_kernel<4>
                          : layer_norm_modulate_backward_kernel<1>;
  launch_kernel(op, scope.stream(), kernel, grid_size(groups * params.parts, op),
                norm_threads(columns, kNormBackwardItems), 0, params);

  NormSumParams sum{params.sums, grad_scale.mutable_data_ptr<float>(), groups, params.parts,
                    params.columns};
  const unsigned blocks = grid_size((groups * columns + kNormSumThreads - 1) / kNormSumThreads, op);
  launch_kernel(op, scope.stream(), norm_sum_parts_kernel, blocks, kNormSumThreads, 0, sum);
  sum.sums += groups * params.parts * columns;
  sum.out = grad_shift.mutable_data_ptr<float>();
  launch_kernel(op, scope.stream(), norm_sum_parts_kernel, blocks, kNormSumThreads, 0, sum);
  return {grad_x, grad_scale, grad_shift};
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate_cuda));
  m.impl("residual_layer_norm_modulate", TORCH_BOX(&residual_layer_norm_modulate_cuda));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward_cuda));
}

}  // namespace
}  // namespace flexvar
