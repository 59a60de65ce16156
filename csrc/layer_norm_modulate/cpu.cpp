#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "common/cpu_memory.h"
#include "layer_norm_modulate/arguments.h"
#include "layer_norm_modulate/cpu_kernel.h"

namespace flexvar {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kElementsPerTask = 16'384;
// Rows whose products are summed by one task of the backward: the order of the sums.
constexpr int64_t kRowsPerSum = 32;

// f(begin, end, scratch) over parts of [0, count), each with `scratch_size` floats of its own.
template <class F>
void in_parallel(int64_t count, int64_t elements, int64_t scratch_size, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks =
      std::clamp<int64_t>(elements / kElementsPerTask, 1, std::min(count, threads));
  Scratch<float> scratch(tasks * scratch_size);
  float* const memory = scratch.data();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      f(count * task / tasks, count * (task + 1) / tasks, memory + task * scratch_size);
    }
  });
}

NormVectors pointer_to(const ImageVectors& vectors) { return {vectors.data(), vectors.stride()}; }

void run_forward(const LayerNormModulateParams& params, int64_t rows) {
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(layer_norm_modulate_rows);
  in_parallel(
      rows, rows * params.columns, norm_scratch(params.columns),
      [&](int64_t begin, int64_t end, float* scratch) { kernel(params, scratch, begin, end); });
}

Tensor layer_norm_modulate_cpu(const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in,
                               double eps, ScalarType dtype) {
  const char* op = "layer_norm_modulate";
  check_tokens(x_in, op);
  const Tensor x = as_contiguous(x_in);
  const ImageVectors scale(scale_in, x, op, "scale"), shift(shift_in, x, op, "shift");
  Tensor out = empty_cpu({x.size(0), x.size(1), x.size(2)}, dtype);
  LayerNormModulateParams params{};
  params.out_element = float_element(dtype, op, "the result");
  if (out.numel() == 0) return out;
  params.x = x.const_data_ptr();
  params.scale = pointer_to(scale);
  params.shift = pointer_to(shift);
  params.out = out.mutable_data_ptr();
  params.x_element = float_element(x.scalar_type(), op, "x");
  params.columns = x.size(2);
  params.rows_per_image = x.size(1);
  params.eps = static_cast<float>(eps);
  run_forward(params, x.size(0) * x.size(1));
  return out;
}

std::tuple<Tensor, Tensor> residual_layer_norm_modulate_cpu(
    const Tensor& x_in, const Tensor& branch_in, const Tensor& gate_in, const Tensor& scale_in,
    const Tensor& shift_in, double eps, ScalarType dtype) {
  const char* op = "residual_layer_norm_modulate";
  check_tokens(x_in, op);
  const Tensor x = as_contiguous(x_in);
  const Tensor branch = like_tokens(branch_in, x, op, "branch");
  const ImageVectors gate(gate_in, x, op, "gate"), scale(scale_in, x, op, "scale"),
      shift(shift_in, x, op, "shift");
  Tensor y = empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor out = empty_cpu({x.size(0), x.size(1), x.size(2)}, dtype);
  LayerNormModulateParams params{};
  params.out_element = float_element(dtype, op, "the result");
  if (out.numel() == 0) return {y, out};
  params.x = x.const_data_ptr();
  params.branch = branch.const_data_ptr();
  params.gate = pointer_to(gate);
  params.scale = pointer_to(scale);
  params.shift = pointer_to(shift);
  params.y = y.mutable_data_ptr();
  params.out = out.mutable_data_ptr();
  params.x_element = float_element(x.scalar_type(), op, "x");
  params.branch_element = float_element(branch.scalar_type(), op, "branch");
  params.columns = x.size(2);
  params.rows_per_image = x.size(1);
  params.eps = static_cast<float>(eps);
  run_forward(params, x.size(0) * x.size(1));
  return {y, out};
}

LayerNormModulateBackwardParams backward_params(const Tensor& grad, const Tensor& x,
                                                const ImageVectors& scale, Tensor& grad_x,
                                                double eps, const char* op) {
  LayerNormModulateBackwardParams params{};
  params.grad_out = grad.const_data_ptr();
  params.x = x.const_data_ptr();
  params.scale = pointer_to(scale);
  params.grad_x = grad_x.mutable_data_ptr();
  params.grad_element = float_element(grad.scalar_type(), op, "grad_out");
  params.x_element = float_element(x.scalar_type(), op, "x");
  params.columns = x.size(2);
  params.rows_per_image = x.size(1);
  params.eps = static_cast<float>(eps);
  return params;
}

// vectors: the gradients of scale, of shift and, if there is a branch, of gate, each of `groups`.
void run_backward(const LayerNormModulateBackwardParams& params, int64_t rows, int64_t groups,
                  std::initializer_list<Tensor*> vectors) {
  const int64_t columns = params.columns, padded = norm_scratch(columns);
  const int64_t outs = static_cast<int64_t>(vectors.size()), rows_per_group = rows / groups;
  const int64_t parts = (rows_per_group + kRowsPerSum - 1) / kRowsPerSum;
  Scratch<float> part_sums(groups * parts * outs * padded);
  float* const sums = part_sums.data();
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(layer_norm_modulate_backward_rows);
  in_parallel(groups * parts, rows * columns, 2 * padded,
              [&](int64_t begin, int64_t end, float* scratch) {
                for (int64_t i = begin; i < end; ++i) {
                  const int64_t first = i / parts * rows_per_group;
                  const int64_t row = first + i % parts * kRowsPerSum;
                  kernel(params, scratch, sums + i * outs * padded, row,
                         std::min(row + kRowsPerSum, first + rows_per_group));
                }
              });
  // In the order of the rows, whatever the number of threads.
  std::vector<double> total(columns);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t which = 0; which < outs; ++which) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t part = 0; part < parts; ++part) {
        const float* part_sum = sums + (outs * (group * parts + part) + which) * padded;
        for (int64_t c = 0; c < columns; ++c) total[c] += part_sum[c];
      }
      float* const result = vectors.begin()[which]->mutable_data_ptr<float>();
      std::copy(total.begin(), total.end(), result + group * columns);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward_cpu(const Tensor& grad_in,
                                                                    const Tensor& x_in,
                                                                    const Tensor& scale_in,
                                                                    double eps) {
  const char* op = "layer_norm_modulate_backward";
  check_tokens(x_in, op);
  const Tensor x = as_contiguous(x_in);
  const Tensor grad = like_tokens(grad_in, x, op, "grad_out");
  const ImageVectors scale(scale_in, x, op, "scale");
  const int64_t groups = scale.count();
  Tensor grad_x = empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor grad_scale = zero_vectors(x, groups), grad_shift = zero_vectors(x, groups);
  if (grad_x.numel() > 0) {
    run_backward(backward_params(grad, x, scale, grad_x, eps, op), x.size(0) * x.size(1), groups,
                 {&grad_scale, &grad_shift});
  }
  return {grad_x, grad_scale, grad_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_layer_norm_modulate_backward_cpu(
    const Tensor& grad_y_in, const Tensor& grad_in, const Tensor& y_in, const Tensor& branch_in,
    const Tensor& gate_in, const Tensor& scale_in, double eps) {
  const char* op = "residual_layer_norm_modulate_backward";
  check_tokens(y_in, op);
  const ResidualGradientInputs given(grad_y_in, grad_in, y_in, branch_in, gate_in, scale_in, op);
  const auto& [y, grad_y, grad, branch, gate, scale] = given;
  const int64_t groups = scale.count();
  Tensor grad_x = empty_cpu({y.size(0), y.size(1), y.size(2)}, y.scalar_type());
  Tensor grad_branch = empty_cpu({y.size(0), y.size(1), y.size(2)}, branch.scalar_type());
  Tensor grad_gate = zero_vectors(y, groups), grad_scale = zero_vectors(y, groups),
         grad_shift = zero_vectors(y, groups);
  if (grad_x.numel() > 0) {
    LayerNormModulateBackwardParams params = backward_params(grad, y, scale, grad_x, eps, op);
    params.grad_y = grad_y.const_data_ptr();
    params.branch = branch.const_data_ptr();
    params.gate = pointer_to(gate);
    params.grad_branch = grad_branch.mutable_data_ptr();
    params.grad_y_element = float_element(grad_y.scalar_type(), op, "grad_y");
    params.branch_element = float_element(branch.scalar_type(), op, "branch");
    run_backward(params, y.size(0) * y.size(1), groups, {&grad_scale, &grad_shift, &grad_gate});
  }
  return {grad_x, grad_branch, grad_gate, grad_scale, grad_shift};
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate_cpu));
  m.impl("residual_layer_norm_modulate", TORCH_BOX(&residual_layer_norm_modulate_cpu));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward_cpu));
  m.impl("residual_layer_norm_modulate_backward",
         TORCH_BOX(&residual_layer_norm_modulate_backward_cpu));
}

}  // namespace
}  // namespace flexvar
