// Every op's schema, once. Semantics: flexvar_ext/reference.py; arguments: flexvar_ext/<op>.py.
#include <torch/csrc/stable/library.h>

#ifndef FLEXVAR_NAMESPACE  // the tests have a library of the CUDA launchers, emulated
#define FLEXVAR_NAMESPACE flexvar
#endif

STABLE_TORCH_LIBRARY(FLEXVAR_NAMESPACE, m) {
  m.def(
      "scale_attention(Tensor q, Tensor k, Tensor v, SymInt[] scale_lengths, float softmax_scale, "
      "Tensor? q_scale) -> (Tensor out, Tensor logsumexp, Tensor inverse_lengths)");
  m.def(
      "scale_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor logsumexp, SymInt[] scale_lengths, float softmax_scale, Tensor? q_scale, "
      "Tensor inverse_lengths) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_scale)");
  m.def(
      "scale_attention_step(Tensor q, Tensor k_cache, Tensor v_cache, SymInt kv_length, "
      "float softmax_scale, Tensor? logit_bound) -> Tensor");
  m.def(
      "append_qkv(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt position, Tensor? "
      "q_scale) -> Tensor");
  m.def("kept_empty(Tensor like, SymInt[] sizes) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? gate, Tensor? "
      "residual) "
      "-> Tensor");
  m.def(
      "linear_few_rows(Tensor x, Tensor weight, Tensor? bias, str activation, bool constant) -> "
      "Tensor");
  m.def(
      "conv3x3(Tensor x, Tensor weight, Tensor? bias, str resize, Tensor? residual, Tensor? "
      "packed) "
      "-> Tensor");
  m.def("conv3x3_pack(Tensor weight, Tensor? bias, str resize, ScalarType dtype) -> Tensor");
  m.def(
      "guided_sample(Tensor logits, SymInt top_k, float top_p, Tensor seeds, Tensor image_ids, "
      "SymInt step) -> Tensor");
  m.def(
      "group_norm_silu(Tensor x, SymInt num_groups, Tensor weight, Tensor bias, float eps, bool "
      "silu, ScalarType dtype) -> (Tensor out, Tensor statistics)");
  m.def(
      "group_norm_silu_backward(Tensor grad_out, Tensor x, SymInt num_groups, Tensor weight, "
      "Tensor bias, Tensor statistics, bool silu) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "layer_norm_modulate(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "layer_norm_modulate_backward(Tensor grad_out, Tensor x, Tensor scale, float eps) "
      "-> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)");
  m.def(
      "residual_layer_norm_modulate(Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor "
      "shift, float eps, ScalarType dtype) -> (Tensor y, Tensor out)");
  m.def(
      "residual_layer_norm_modulate_backward(Tensor grad_y, Tensor grad_out, Tensor y, Tensor "
      "branch, Tensor gate, Tensor scale, float eps) -> (Tensor grad_x, Tensor grad_branch, Tensor "
      "grad_gate, Tensor grad_scale, Tensor grad_shift)");
  m.def("vq_lookup(Tensor latents, Tensor codebook, bool normalize) -> Tensor");
  // On a CPU only; the codebook is looked at while it is used.
  m.def(
      "vq_lookup_checked(Tensor latents, Tensor codebook, bool normalize) "
      "-> (Tensor indices, bool codebook_is_finite)");
  m.def("resample2d(Tensor x, SymInt height, SymInt width, str mode, bool antialias) -> Tensor");
  m.def(
      "resample2d_backward(Tensor grad, SymInt height, SymInt width, str mode, bool antialias) -> "
      "Tensor");
  m.def(
      "embed_resample(Tensor indices, Tensor codebook, SymInt height, SymInt width, bool "
      "normalize, str mode) -> Tensor");
  m.def(
      "embed_resample_backward(Tensor grad, Tensor indices, Tensor codebook, SymInt height, SymInt "
      "width, bool normalize, str mode) -> Tensor");
  m.def(
      "vq_lookup_multiscale(Tensor latent, Tensor codebook, SymInt[] heights, SymInt[] widths, "
      "bool normalize, str mode, bool antialias) -> Tensor");
  m.def(
      "vq_lookup_multiscale_checked(Tensor latent, Tensor codebook, SymInt[] heights, SymInt[] "
      "widths, bool normalize, str mode, bool antialias) "
      "-> (Tensor indices, bool codebook_is_finite)");
}
