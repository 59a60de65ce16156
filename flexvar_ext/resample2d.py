"""Resizing of images and latents."""

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
    check_size,
    check_tensor,
)
from flexvar_ext._registration import differentiable

MODES = ("nearest", "bilinear", "bicubic", "area")


def resample2d(x: Tensor, size: tuple[int, int], *, mode: str, antialias: bool = False) -> Tensor:
    """``torch.nn.functional.interpolate(x, size, mode=mode, align_corners=False, antialias=antialias)``, for any ratio.

    Output pixel (i, j) is ``sum_k sum_l wy[i, k] * wx[j, l] * x[..., k, l]``. An axis that goes from n to m pixels has
    these weights, with s = n / m and c = s * (i + 1/2) - 1/2:

    - ``nearest``: 1 at floor(s * i);
    - ``bilinear``: 1 - |k - c| over the two pixels around c >= 0; with ``antialias`` the triangle is max(s, 1) times as
      wide, and normalised;
    - ``bicubic``: Keys' kernel with A = -0.75 over the four pixels around c, the border's repeated outside the image;
    - ``area``: the mean over pixels floor(s * i) … ceil(s * (i + 1)) - 1.

    Sums are accumulated in float32 (float64 for float64), each in a fixed order: equal input gives equal output for any
    batch, thread count and run. Under autocast the dtype of ``x`` is kept.

    Args:
        x: [B, C, H, W], float32, float64, float16 or bfloat16, any strides; B and C may be 0.
        size: (h, w) of the result, positive.
        mode: ``nearest``, ``bilinear``, ``bicubic`` or ``area``.
        antialias: only with ``bilinear``.

    Returns: [B, C, h, w], contiguous, of x's dtype and device. Differentiable, twice too.

    Raises: TypeError and ValueError naming the argument, the rule and the value got.
    """
    check_tensor("resample2d", "x", x, "[B, C, H, W]", WITH_FLOAT64)
    height, width = check_size("resample2d", "size", size)
    check_choice("resample2d", "mode", mode, MODES)
    check_bool("resample2d", "antialias", antialias)
    if antialias and mode != "bilinear":
        raise ValueError(f"resample2d: antialias must go with mode 'bilinear', got mode {mode!r}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"resample2d: x must have at least one pixel, got shape {tuple(x.shape)}")
    check_elements("resample2d", "size", size, x.shape[0] * x.shape[1] * height * width)
    check_no_tangent("resample2d", x)
    result: Tensor = _resample2d(x, height, width, mode, antialias)
    return result


@torch.library.register_fake("flexvar::resample2d")
@torch.library.register_fake("flexvar::resample2d_backward")
def _(x: Tensor, height: int, width: int, mode: str, antialias: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], height, width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, *ctx.mode = inputs
    ctx.input_size = x.shape[2:]


# The op is linear: each of the two is the other's transpose.
def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return torch.ops.flexvar.resample2d_backward(grad, *ctx.input_size, *ctx.mode), None, None, None, None


def _gradient_of_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return torch.ops.flexvar.resample2d(grad, *ctx.input_size, *ctx.mode), None, None, None, None


_resample2d = differentiable("resample2d", _gradient, _save)
torch.library.register_autograd("flexvar::resample2d_backward", _gradient_of_gradient, setup_context=_save)
