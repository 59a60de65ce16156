// Checks that guard memory safety. Errors that a user can cause are raised in Python
// (flexvar_ext/<op>.py) with the types and texts that users see; these catch what reaches
// torch.ops.flexvar.* directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/float_element.h"

namespace flexvar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_rank(const Tensor& t, int64_t rank, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == rank, op, ": ", name, " must have ", rank, " dimensions, got ",
                  t.dim());
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has an unexpected dtype");
}

inline void check_same_device(const Tensor& a, const Tensor& b, const char* op, const char* name) {
  STD_TORCH_CHECK(a.device() == b.device(), op, ": ", name,
                  " must be on the device of the first argument");
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline FloatElement float_element(ScalarType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(is_floating(dtype), op, ": ", name,
                  " must have dtype float32, float16 or bfloat16");
  return dtype == ScalarType::Float  ? FloatElement::float32
         : dtype == ScalarType::Half ? FloatElement::float16
                                     : FloatElement::bfloat16;
}

inline Element element_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::Half:
      return Element::float16;
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, op, ": ", name,
                      " must have dtype float32, float64, float16 or bfloat16");
      return Element::bfloat16;
  }
}

}  // namespace flexvar
