// Shapes and argument checks that the CPU and CUDA launchers of embed_resample share.
#pragma once

#include <string>

#include "resample/arguments.h"

namespace flexvar {

struct EmbedShape {
  int64_t batch, in_height, in_width;  // of the indices
  int64_t height, width;               // of the tokens' grid
  int64_t num_codes, dim;
  ResampleMode mode;
  Element element;
};

inline EmbedShape embed_shape(const Tensor& indices, const Tensor& codebook, int64_t height,
                              int64_t width, const std::string& mode, const char* op) {
  check_rank(indices, 3, op, "indices");
  check_rank(codebook, 2, op, "codebook");
  check_dtype(indices, ScalarType::Long, op, "indices");
  check_same_device(indices, codebook, op, "codebook");
  const EmbedShape s{indices.size(0),
                     indices.size(1),
                     indices.size(2),
                     height,
                     width,
                     codebook.size(0),
                     codebook.size(1),
                     parse_resample_mode(mode, false, op),
                     element_of(codebook, op, "codebook")};
  check_side(s.in_height, op, "height of indices");
  check_side(s.in_width, op, "width of indices");
  check_side(s.height, op, "height");
  check_side(s.width, op, "width");
  return s;
}

inline void check_token_gradient(const Tensor& grad, const Tensor& codebook, const EmbedShape& s,
                                 const char* op) {
  check_rank(grad, 3, op, "grad");
  check_same_device(grad, codebook, op, "codebook");
  STD_TORCH_CHECK(grad.size(0) == s.batch && grad.size(1) == s.height * s.width &&
                      grad.size(2) == s.dim && grad.scalar_type() == codebook.scalar_type(),
                  op, ": grad must have the tokens' shape [B, h*w, C] and the codebook's dtype");
}

}  // namespace flexvar
