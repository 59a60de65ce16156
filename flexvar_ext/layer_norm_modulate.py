"""Layer normalisation with each image's own scale and shift (AdaLN), alone and behind a gated residual."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexvar_ext import reference
from flexvar_ext._checks import (
    FLOATING,
    WITH_FLOAT64,
    alike,
    check_eps,
    check_no_tangent,
    check_same_device,
    check_tensor,
)
from flexvar_ext._registration import differentiable, forbid_second_gradient

CUDA_MAX_CHANNELS = 4096  # of a row that the registers of a thread block hold


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """``LN(x) * scale + shift`` with ``LN(x) = (x - mean) / sqrt(variance + eps)`` over the channels of a token.

    The adaptive layer norm of DiT (arXiv 2212.09748), whose ``1 + scale`` is this ``scale``. One pass over memory: x is
    read, the result written, and nothing else but the vectors. Arithmetic is in float32, rounded once; a token's
    result does not depend on other tokens, on the batch or on the number of threads, bit for bit. Gradients likewise,
    their sums over tokens in one fixed order.

    Args:
        x: [B, L, C], float32, float16, bfloat16 or float64, any strides; C >= 1, on CUDA at most 4096.
        scale, shift: both [B, 1, C], or both [1, 1, C] for all images; any of these dtypes, float32 best.
        eps: added to the variance; finite, not negative.
        dtype: of the result; that of x unless given, under autocast autocast's: what the linear layer behind it reads.

    Returns: [B, L, C], contiguous. Differentiable once. float64 runs as :mod:`flexvar_ext.reference`.

    Raises: TypeError and ValueError naming the argument, the rule and the value got.
    """
    if not _fit((x,), (scale, shift), eps, dtype):
        _check("layer_norm_modulate", x, {"scale": scale, "shift": shift}, {}, eps, dtype)
        if torch.float64 in (x.dtype, scale.dtype, shift.dtype, dtype):
            return reference.layer_norm_modulate(x, scale, shift, eps=eps, dtype=dtype)
    dtype = dtype or reference.result_dtype(x)
    check_no_tangent("layer_norm_modulate", x, scale, shift)
    out: Tensor = _layer_norm_modulate(x, scale, shift, eps, dtype)
    return out


def residual_layer_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x + gate * branch`` and ``layer_norm_modulate(y, scale, shift)``, in one pass over memory.

    The second result is that of :func:`layer_norm_modulate` on the first, bit for bit.

    Args:
        x: [B, L, C] as for :func:`layer_norm_modulate`.
        branch: [B, L, C], any of its dtypes.
        gate, scale, shift: all [B, 1, C], or all [1, 1, C] for all images; any of its dtypes.
        eps, dtype: as for :func:`layer_norm_modulate`; ``dtype`` is that of the second result.

    Returns: y, of x's dtype, and LN(y) * scale + shift: [B, L, C] each, contiguous. Differentiable once.

    Raises: TypeError and ValueError naming the argument, the rule and the value got.
    """
    if not _fit((x, branch), (scale, shift, gate), eps, dtype):
        op = "residual_layer_norm_modulate"
        _check(op, x, {"scale": scale, "shift": shift, "gate": gate}, {"branch": branch}, eps, dtype)
        if torch.float64 in (x.dtype, branch.dtype, gate.dtype, scale.dtype, shift.dtype, dtype):
            return reference.residual_layer_norm_modulate(x, branch, gate, scale, shift, eps=eps, dtype=dtype)
    dtype = dtype or reference.result_dtype(x)
    check_no_tangent("residual_layer_norm_modulate", x, branch, gate, scale, shift)
    y, out = _residual_layer_norm_modulate(x, branch, gate, scale, shift, eps, dtype)
    return y, out


def _fit(tokens: tuple[Tensor, ...], vectors: tuple[Tensor, ...], eps: float, dtype: torch.dtype | None) -> bool:
    """Whether the native op takes these as they are: a quick look (``alike``), right or not at all."""
    if not alike(tokens + vectors, 3) or not (dtype is None or dtype in FLOATING):
        return False
    batch, length, channels = tokens[0].shape
    for tensor in tokens[1:]:
        if tensor.shape != (batch, length, channels):
            return False
    for tensor in vectors:
        if tensor.shape != (batch, 1, channels):
            return False
    return 0 < channels <= CUDA_MAX_CHANNELS and type(eps) is float and 0 <= eps < math.inf


def _check(
    op: str,
    x: Tensor,
    vectors: dict[str, Tensor],
    tokens: dict[str, Tensor],
    eps: float,
    dtype: torch.dtype | None,
) -> None:
    check_tensor(op, "x", x, "[B, L, C]", WITH_FLOAT64)
    batch, _, channels = x.shape
    if channels == 0:
        raise ValueError(f"{op}: x must have at least one channel, got shape {tuple(x.shape)}")
    if x.is_cuda and channels > CUDA_MAX_CHANNELS:
        raise ValueError(f"{op}: x must have at most {CUDA_MAX_CHANNELS} channels on CUDA, got {channels}")
    for name, tensor in tokens.items():
        check_tensor(op, name, tensor, "[B, L, C]", WITH_FLOAT64)
        if tensor.shape != x.shape:
            raise ValueError(f"{op}: {name} must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}")
    allowed: tuple[tuple[int, ...], ...] = ((batch, 1, channels), (1, 1, channels))
    shape: tuple[int, ...] | None = None
    for name, vector in vectors.items():  # scale is the first
        check_tensor(op, name, vector, "[B, 1, C]", WITH_FLOAT64)
        given = vector.shape
        if given not in allowed:
            raise ValueError(f"{op}: {name} must have shape [B or 1, 1, C], got {tuple(given)} for x {tuple(x.shape)}")
        if shape is None:
            shape = given
        elif given != shape:
            raise ValueError(f"{op}: {name} must have the shape of scale, {shape}, got {tuple(given)}")
    check_same_device(op, x=x, **tokens, **vectors)
    check_eps(op, eps)
    if dtype is not None and dtype not in WITH_FLOAT64:
        raise TypeError(f"{op}: dtype must be float32, float16, bfloat16 or float64, got {dtype!r}")


@torch.library.register_fake("flexvar::layer_norm_modulate")
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("flexvar::residual_layer_norm_modulate")
def _(
    x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("flexvar::layer_norm_modulate_backward")
def _(grad_out: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty(scale.shape, dtype=torch.float32)
    return x.new_empty(x.shape), sums, torch.empty_like(sums)


@torch.library.register_fake("flexvar::residual_layer_norm_modulate_backward")
def _(
    grad_y: Tensor, grad_out: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = [y.new_empty(scale.shape, dtype=torch.float32) for _ in range(3)]
    return y.new_empty(y.shape), branch.new_empty(y.shape), sums[0], sums[1], sums[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, ctx.eps, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    grad_x, grad_scale, grad_shift = torch.ops.flexvar.layer_norm_modulate_backward(grad_out, x, scale, ctx.eps)
    return grad_x, grad_scale.to(scale.dtype), grad_shift.to(ctx.shift_dtype), None, None


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, scale, shift, ctx.eps, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], branch, gate, scale)


def _residual_gradient(ctx: Any, grad_y: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    y, branch, gate, scale = ctx.saved_tensors
    if grad_out is None:  # the norm is not used: where it is NaN, gradients of 0 would come back as NaN
        return *_sum_gradient(grad_y, branch, gate), None, None, None, None
    if grad_y is None:
        grad_y = torch.zeros_like(y)
    grad_x, grad_branch, grad_gate, grad_scale, grad_shift = torch.ops.flexvar.residual_layer_norm_modulate_backward(
        grad_y, grad_out, y, branch, gate, scale, ctx.eps
    )
    vectors = (grad_gate.to(gate.dtype), grad_scale.to(scale.dtype), grad_shift.to(ctx.shift_dtype))
    return grad_x, grad_branch, *vectors, None, None


def _sum_gradient(grad_y: Tensor | None, branch: Tensor, gate: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, branch and gate in x + gate * branch."""
    if grad_y is None:
        return None, None, None
    grad = grad_y.float()
    grad_gate = (grad * branch).sum_to_size(gate.shape)
    return grad_y, (grad * gate).to(branch.dtype), grad_gate.to(gate.dtype)


_layer_norm_modulate = differentiable("layer_norm_modulate", _gradient, _save)
_residual_layer_norm_modulate = differentiable("residual_layer_norm_modulate", _residual_gradient, _save_residual)
forbid_second_gradient("layer_norm_modulate")
forbid_second_gradient("residual_layer_norm_modulate")
