// Every op's schema, once. Semantics: flexvar_ext/reference.py; arguments: flexvar_ext/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(flexvar, m) {
  m.def("vq_lookup(Tensor latents, Tensor codebook, bool normalize) -> Tensor");
}
