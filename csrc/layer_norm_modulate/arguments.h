// What both launchers of layer_norm_modulate and its relatives make of their arguments.
#pragma once

#include "common/tensor_checks.h"
#include "common/tensor_memory.h"

namespace flexvar {

// A vector for each image, or one for all: [B or 1, 1, C] in float32, read in place where possible.
class ImageVectors {
 public:
  ImageVectors(const Tensor& given, const Tensor& x, const char* op, const char* name)
      : tensor_(given) {
    check_rank(given, 3, op, name);
    check_same_device(x, given, op, name);
    float_element(given.scalar_type(), op, name);
    STD_TORCH_CHECK((given.size(0) == 1 || given.size(0) == x.size(0)) && given.size(1) == 1 &&
                        given.size(2) == x.size(2),
                    op, ": ", name, " must have shape [B or 1, 1, C]");
    tensor_ = as_dtype(given, ScalarType::Float);
    if (tensor_.stride(2) != 1) tensor_ = torch::stable::contiguous(tensor_);
  }
  const float* data() const { return tensor_.const_data_ptr<float>(); }
  // From one image's vector to the next one's.
  int64_t stride() const { return tensor_.size(0) == 1 ? 0 : tensor_.stride(0); }
  int64_t count() const { return tensor_.size(0); }

 private:
  Tensor tensor_;
};

inline void check_tokens(const Tensor& x, const char* op) {
  check_rank(x, 3, op, "x");
  float_element(x.scalar_type(), op, "x");
  STD_TORCH_CHECK(x.size(2) > 0, op, ": x must have at least one channel");
}

// Of the shape of x, contiguous.
inline Tensor like_tokens(const Tensor& given, const Tensor& x, const char* op, const char* name) {
  check_rank(given, 3, op, name);
  check_same_device(x, given, op, name);
  float_element(given.scalar_type(), op, name);
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(given.size(i) == x.size(i), op, ": ", name, " must have the shape of x");
  }
  return as_contiguous(given);
}

// For the gradients of vectors.
inline Tensor zero_vectors(const Tensor& x, int64_t count) {
  return torch::stable::new_zeros(x, {count, 1, x.size(2)}, ScalarType::Float);
}

// What the gradients of y = x + gate * branch and LN(y) * scale + shift are made from.
struct ResidualGradientInputs {
  ResidualGradientInputs(const Tensor& grad_y_in, const Tensor& grad_in, const Tensor& y_in,
                         const Tensor& branch_in, const Tensor& gate_in, const Tensor& scale_in,
                         const char* op)
      : y(as_contiguous(y_in)),
        grad_y(like_tokens(grad_y_in, y, op, "grad_y")),
        grad(like_tokens(grad_in, y, op, "grad_out")),
        branch(like_tokens(branch_in, y, op, "branch")),
        gate(gate_in, y, op, "gate"),
        scale(scale_in, y, op, "scale") {
    STD_TORCH_CHECK(gate.count() == scale.count(), op, ": gate must have the shape of scale");
  }

  const Tensor y, grad_y, grad, branch;
  const ImageVectors gate, scale;
};

}  // namespace flexvar
