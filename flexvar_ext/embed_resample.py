"""Codes to the tokens of the next scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexvar_ext._checks import (
    WITH_FLOAT64,
    check_bool,
    check_choice,
    check_elements,
    check_no_tangent,
    check_same_device,
    check_size,
    check_tensor,
    is_readable,
)
from flexvar_ext._registration import differentiable, forbid_second_gradient
from flexvar_ext.resample2d import MODES

_INT64 = (torch.int64,)


def embed_resample(
    indices: Tensor,
    codebook: Tensor,
    size: tuple[int, int],
    *,
    normalize: bool = True,
    mode: str = "bicubic",
) -> Tensor:
    """The transformer's input for the next scale: gather codes, resize their grid, lay it out as tokens, in one pass.

    ``tokens[b, i * w + j] = sum_k sum_l wy[i, k] * wx[j, l] * e(codebook[indices[b, k, l]])`` with the weights of
    :func:`resample2d` (FlexVAR, arXiv 2502.20313, section 3.3: bicubic in the released code) and
    ``e(c) = c / max(|c|, 1e-12)``, or ``e(c) = c`` without ``normalize``.

    Sums are accumulated in float32 (float64 for float64) in a fixed order, gradients too: equal input gives equal
    output for any batch, thread count and run. Under autocast the codebook's dtype is kept, as in an embedding.

    Args:
        indices: int64 [B, h0, w0], each in [0, V); B may be 0.
        codebook: [V, C], float32, float64, float16 or bfloat16.
        size: (h, w) of the tokens' grid, positive.
        normalize: use the codes scaled to length 1.
        mode: ``nearest``, ``bilinear``, ``bicubic`` or ``area``.

    Returns: tokens [B, h * w, C] of the codebook's dtype. Differentiable once in ``codebook``.

    Raises: TypeError and ValueError naming the argument, the rule and the value got. An index outside [0, V) is a
    ValueError on a CPU (a RuntimeError where torch.compile made the call); on CUDA, where looking would mean waiting,
    the tokens that it reaches are NaN.
    """
    if not _is_left_to_the_kernel(indices, codebook, size, normalize, mode):
        _check(indices, codebook, size, normalize, mode)
    height, width = size
    check_no_tangent("embed_resample", codebook)
    result: Tensor
    if torch.compiler.is_compiling():
        result = _embed_resample(indices, codebook, height, width, normalize, mode)
        return result
    try:
        result = _embed_resample(indices, codebook, height, width, normalize, mode)
    except RuntimeError as error:
        _check(indices, codebook, size, normalize, mode)
        _, found, rest = str(error).partition("embed_resample: indices must")  # only the kernel looks at every index
        if not found:
            raise
        raise ValueError(found + rest.partition("\n")[0]) from None
    return result


def _is_left_to_the_kernel(
    indices: Tensor, codebook: Tensor, size: tuple[int, int], normalize: bool, mode: str
) -> bool:
    if not is_readable(indices, codebook):
        return False
    if type(size) is not tuple or len(size) != 2 or type(normalize) is not bool or type(mode) is not str:
        return False
    return type(size[0]) is int and type(size[1]) is int


def _check(indices: Tensor, codebook: Tensor, size: tuple[int, int], normalize: bool, mode: str) -> None:
    check_tensor("embed_resample", "indices", indices, "[B, h0, w0]", _INT64)
    check_tensor("embed_resample", "codebook", codebook, "[V, C]", WITH_FLOAT64)
    check_same_device("embed_resample", indices=indices, codebook=codebook)
    height, width = check_size("embed_resample", "size", size)
    check_choice("embed_resample", "mode", mode, MODES)
    check_bool("embed_resample", "normalize", normalize)
    batch, grid_height, grid_width = indices.shape
    if grid_height == 0 or grid_width == 0:
        raise ValueError(f"embed_resample: indices must have at least one cell, got shape {tuple(indices.shape)}")
    check_elements("embed_resample", "size", size, batch * height * width * codebook.shape[1])


@torch.library.register_fake("flexvar::embed_resample")
def _(indices: Tensor, codebook: Tensor, height: int, width: int, normalize: bool, mode: str) -> Tensor:
    return codebook.new_empty(indices.shape[0], height * width, codebook.shape[1])


@torch.library.register_fake("flexvar::embed_resample_backward")
def _(grad: Tensor, indices: Tensor, codebook: Tensor, height: int, width: int, normalize: bool, mode: str) -> Tensor:
    return codebook.new_empty(codebook.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, codebook, *ctx.options = inputs
    ctx.save_for_backward(indices, codebook)


def _gradient(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None, None]:
    indices, codebook = ctx.saved_tensors
    grad_codebook = torch.ops.flexvar.embed_resample_backward(grad, indices, codebook, *ctx.options)
    return None, grad_codebook, None, None, None, None


_embed_resample = differentiable("embed_resample", _gradient, _save)
forbid_second_gradient("embed_resample")
