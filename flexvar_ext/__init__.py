"""Exact, fast tensor ops of the FlexVAR family (arXiv 2502.20313) for CPU and CUDA.

Plain functions on tensors of any supported device; ``flexvar_ext.reference.<same name>`` is the specification in plain
PyTorch. Importing registers the native ops with torch and does nothing else.
"""

from flexvar_ext._loader import load_libraries

HAS_CUDA_KERNELS: bool = load_libraries()  # before the op files: they attach to the ops that the libraries register

from flexvar_ext import reference  # noqa: E402
from flexvar_ext.append_qkv import append_qkv  # noqa: E402
from flexvar_ext.conv3x3 import conv3x3, conv3x3_is_native, conv3x3_pack  # noqa: E402
from flexvar_ext.embed_resample import embed_resample  # noqa: E402
from flexvar_ext.group_norm_silu import group_norm_silu  # noqa: E402
from flexvar_ext.guided_sample import guided_sample  # noqa: E402
from flexvar_ext.layer_norm_modulate import layer_norm_modulate, residual_layer_norm_modulate  # noqa: E402
from flexvar_ext.linear import linear  # noqa: E402
from flexvar_ext.resample2d import resample2d  # noqa: E402
from flexvar_ext.scale_attention import scale_attention, scale_attention_step  # noqa: E402
from flexvar_ext.vq_lookup import vq_lookup  # noqa: E402
from flexvar_ext.vq_lookup_multiscale import vq_lookup_multiscale  # noqa: E402

__all__ = [
    "HAS_CUDA_KERNELS",
    "append_qkv",
    "conv3x3",
    "conv3x3_is_native",
    "conv3x3_pack",
    "embed_resample",
    "group_norm_silu",
    "guided_sample",
    "layer_norm_modulate",
    "linear",
    "reference",
    "resample2d",
    "residual_layer_norm_modulate",
    "scale_attention",
    "scale_attention_step",
    "vq_lookup",
    "vq_lookup_multiscale",
]
