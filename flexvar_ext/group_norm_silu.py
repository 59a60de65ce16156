"""Group normalisation and SiLU behind it, the step between two convolutions, in one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexvar_ext import reference
from flexvar_ext._checks import (
    WITH_FLOAT64,
    alike,
    check_bool,
    check_eps,
    check_integer,
    check_no_tangent,
    check_same_device,
    check_tensor,
)
from flexvar_ext._registration import differentiable, forbid_second_gradient


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, silu: bool = True
) -> Tensor:
    """``SiLU(GN(x) * weight + bias)`` with ``GN(x) = (x - mean) / sqrt(variance + eps)`` over each group of channels.

    Group normalisation (arXiv 1803.08494) and ``SiLU(y) = y / (1 + exp(-y))`` as VQGAN's networks use them (arXiv
    2012.09841). x is read twice and the result written once, nothing else of that size. Arithmetic is in float32,
    rounded once; variances are summed from differences and never as a difference of large squares. An image's result
    does not depend on the batch or on the number of threads, bit for bit. Gradients likewise, those of weight and bias
    summed over images in their order. On bfloat16 maps SiLU may be off by 1.4e-4, a fourteenth of what their
    rounding makes.

    Args:
        x: [B, C, H, W], float32, float16, bfloat16 or float64. Contiguous and channels-last maps are read as they are,
            other strides copied to the one of the two that they resemble.
        num_groups: groups of C / num_groups neighbouring channels; divides C.
        weight, bias: [C], any of these dtypes.
        eps: added to the variance; finite, not negative.
        silu: False for the group normalisation alone.

    Returns: [B, C, H, W] in x's memory format and dtype; under autocast in autocast's. Differentiable once. float64
        runs as :mod:`flexvar_ext.reference`.

    Raises: TypeError and ValueError naming the argument, the rule and the value got.
    """
    if not _fit(x, num_groups, weight, bias, eps, silu):
        _check(x, num_groups, weight, bias, eps, silu)
        if torch.float64 in (x.dtype, weight.dtype, bias.dtype):
            return reference.group_norm_silu(x, num_groups, weight, bias, eps=eps, silu=silu)
    check_no_tangent("group_norm_silu", x, weight, bias)
    out: Tensor = _group_norm_silu(x, num_groups, weight, bias, eps, silu, reference.result_dtype(x))[0]
    return out


def _fit(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> bool:
    """Whether the native op takes these as they are: a quick look (``alike``), right or not at all."""
    if not (alike((x,), 4) and alike((weight, bias), 1, beside=x)) or type(num_groups) is not int:
        return False
    channels = x.shape[1]
    if weight.shape[0] != channels or bias.shape[0] != channels or channels == 0:
        return False
    return (
        num_groups > 0
        and channels % num_groups == 0
        and type(eps) is float
        and 0 <= eps < math.inf
        and type(silu) is bool
    )


def _check(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> None:
    op = "group_norm_silu"
    check_tensor(op, "x", x, "[B, C, H, W]", WITH_FLOAT64)
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(f"{op}: x must have at least one channel, got shape {tuple(x.shape)}")
    check_integer(op, "num_groups", num_groups, 1, 2**31)
    if channels % num_groups != 0:
        raise ValueError(f"{op}: num_groups must divide the channels of x, {channels}, got {num_groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        check_tensor(op, name, vector, "[C]", WITH_FLOAT64)
        if vector.shape[0] != channels:
            raise ValueError(f"{op}: {name} must have shape [C] with C = {channels}, got {tuple(vector.shape)}")
    check_same_device(op, x=x, weight=weight, bias=bias)
    check_eps(op, eps)
    check_bool(op, "silu", silu)


def _in_its_format(x: Tensor) -> Tensor:
    """x as csrc/group_norm_silu/arguments.h reads it, whose strides the results have."""
    if not x.is_contiguous() and x.stride(1) == 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


@torch.library.register_fake("flexvar::group_norm_silu")
def _(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], num_groups, 2, dtype=torch.float32)
    return torch.empty_like(_in_its_format(x), dtype=dtype), statistics


@torch.library.register_fake("flexvar::group_norm_silu_backward")
def _(
    grad_out: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, statistics: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty(weight.shape, dtype=torch.float32)
    return torch.empty_like(_in_its_format(x)), sums, torch.empty_like(sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, _, ctx.silu, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of 0 for it
    ctx.save_for_backward(x, weight, bias, output[1])


def _gradient(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    x, weight, bias, statistics = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.flexvar.group_norm_silu_backward(
        grad_out, x, ctx.num_groups, weight, bias, statistics, ctx.silu
    )
    return grad_x, None, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None, None


_group_norm_silu = differentiable("group_norm_silu", _gradient, _save)
forbid_second_gradient("group_norm_silu")
