"""The 3x3 convolutions of a convolutional autoencoder, with the change of resolution and the skip around them."""

from __future__ import annotations

import torch
from torch import Tensor

from flexvar_ext import _host, reference
from flexvar_ext._checks import (
    WITH_FLOAT64,
    alike,
    check_choice,
    check_same_device,
    check_tensor,
    is_differentiated,
)
from flexvar_ext._device import has_warpgroup_products
from flexvar_ext._registration import register_autocast

RESIZES = ("none", "down", "up")


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    resize: str = "none",
    residual: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """``residual + conv2d(x, weight, bias)`` with 3x3 taps, zeros around x, and perhaps a change of resolution.

    On CPUs from AVX2 on, float32 and bfloat16 run here, channels last, products being summed in float32. Upsampling
    costs 4 products a pixel instead of 9, since sums of taps stand for taps on equal pixels. So do float32 maps of 32
    and more channels that keep their resolution, by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308), and
    bfloat16 ones cost 2.25, by F(4x4, 3x3) in float32: the error is about that of the definition, but small against the
    largest number and tap that a square of as many pixels sees, not against each product; squares whose sums are not
    finite are redone by the definition. The order of sums depends on C, N and resize alone: an image's result is the
    same in any batch and on any number of threads, to the bit. On a tile unit (AMX) all taps are multiplied, and a
    float32 number is the sum of three bfloat16 numbers: the error is about that of float32 arithmetic, smaller where
    the sums are long. Parts below 2^-126 are zero there, so factors and products below about 2e-31 keep fewer digits.

    On CUDA, upsampling runs on tensor cores in float16 and bfloat16, channels last, with the same 4 products. They are
    summed in float32, bias and residual added to the sums, and the result is rounded once; so are the sums of taps.
    The order of sums depends on C, N, resize and the GPU alone: an image's result is the same in any batch, to the bit.
    On Hopper (sm_90a) so do maps of 64 to 256 channels that keep their resolution.

    Elsewhere this is the composition of torch's own ops in :func:`flexvar_ext.reference.conv3x3`
    (:func:`conv3x3_is_native` tells): in float64, on CPUs in float16 or without AVX2, on CUDA in float32 and in what
    is not named above, and wherever a gradient is needed, a forward-mode one too.

    Args:
        x: [B, C, H, W] in any layout, float32, float16, bfloat16 or float64; C >= 1.
        weight: [N, C, 3, 3] as ``torch.nn.Conv2d`` holds it, N >= 1, of x's dtype (under autocast, of autocast's), or
            float32, which is rounded to that dtype.
        bias: [N], of one of weight's dtypes, or None.
        resize: ``none``: [h, w] = [H, W]. ``down``: stride 2 behind a row and a column of zeros below and to the right,
            [H // 2, W // 2] of at least 2 x 2 pixels. ``up``: nearest neighbour to [2 H, 2 W] before the convolution.
        residual: [B, N, h, w] of the result's dtype, or None.
        packed: what :func:`conv3x3_pack` made of this weight and bias, which then are not read; or None.

    Returns: [B, N, h, w] of x's dtype (under autocast, of autocast's); channels last where it runs natively.

    Raises: TypeError and ValueError naming the argument, the rule and the value got.
    """
    if not _fit(x, weight, bias, resize, residual):
        _check(x, weight, bias, resize, residual)
    if packed is not None:
        _check_packed(packed, x)
    is_native = conv3x3_is_native(x, resize=resize, out_channels=weight.shape[0])
    if not is_native or is_differentiated(x, weight, bias, residual):
        return reference.conv3x3(x, weight, bias, resize=resize, residual=residual)
    result: Tensor = torch.ops.flexvar.conv3x3(x, weight, bias, resize, residual, packed)
    return result


def conv3x3_pack(
    weight: Tensor, bias: Tensor | None = None, *, resize: str = "none", dtype: torch.dtype
) -> Tensor | None:
    """The weight and bias as the CUDA kernel of :func:`conv3x3` reads them, which it otherwise makes at every call.

    The result of the convolution is the same, to the bit. Nobody checks that what is packed has stayed the weight.

    Args:
        weight, bias, resize: as for :func:`conv3x3`.
        dtype: of that function's result.

    Returns: [K] of ``dtype``, in a layout that belongs to this GPU; None where the kernel does not run.
    Raises: TypeError and ValueError naming the argument, the rule and the value got.
    """
    op = "conv3x3_pack"
    check_tensor(op, "weight", weight, "[N, C, 3, 3]", WITH_FLOAT64)
    if dtype not in WITH_FLOAT64:
        raise TypeError(f"{op}: dtype must be float32, float16, bfloat16 or float64, got {dtype!r}")
    pixels = weight.new_empty((1, weight.shape[1], 2, 2), dtype=dtype)
    _check(pixels, weight, bias, resize, None, op)
    is_native = conv3x3_is_native(pixels, resize=resize, out_channels=weight.shape[0])
    if not weight.is_cuda or not is_native or is_differentiated(weight, bias):
        return None
    packed: Tensor = torch.ops.flexvar.conv3x3_pack(weight, bias, resize, dtype)
    return packed


def conv3x3_is_native(x: Tensor, *, resize: str = "none", out_channels: int | None = None) -> bool:
    """Whether :func:`conv3x3` of x runs on this library's kernel (where no gradient is needed), or on torch's.

    ``out_channels`` is N, as many as x has where it is None; on CUDA it may depend on that.
    """
    dtype = reference.result_dtype(x)
    if x.is_cuda:
        if dtype not in (torch.float16, torch.bfloat16):
            return False
        return resize == "up" or (resize == "none" and _has_fast_kernel(x, out_channels))
    return x.is_cpu and dtype in (torch.float32, torch.bfloat16) and _has_kernel()


def _has_fast_kernel(x: Tensor, out_channels: int | None) -> bool:
    """Whether the kernel multiplies by warpgroups (``plan_conv3x3``) as many channels as are worth it: elsewhere cuDNN
    is the faster one, which cuts the depth of more channels into parts."""
    channels = x.shape[1] if x.ndim == 4 else 0
    suits = channels % 8 == 0 and 64 <= channels <= 256 and (out_channels is None or out_channels >= 64)
    return suits and has_warpgroup_products(x.device)


@torch.compiler.assume_constant_result
def _has_kernel() -> bool:
    return _host.cpu_isa() != "baseline"


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None, resize: str, residual: Tensor | None) -> bool:
    """Whether the native op takes these as they are: a quick look (``alike``), right or not at all."""
    if not alike((x, weight) if residual is None else (x, weight, residual), 4) or resize not in RESIZES:
        return False
    columns, channels, *taps = weight.shape
    shape = x.shape
    fewest = 2 if resize == "down" else 1
    if taps != [3, 3] or columns == 0 or shape[1] != channels or channels == 0 or min(shape[2:]) < fewest:
        return False
    dtype = reference.result_dtype(x)
    if weight.dtype not in (dtype, torch.float32):
        return False
    if bias is not None and not (alike((bias,), 1, (dtype, torch.float32), beside=x) and bias.shape[0] == columns):
        return False
    return residual is None or (residual.dtype == dtype and residual.shape == _result_shape(x, weight, resize))


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, resize: str, residual: Tensor | None, op: str = "conv3x3"
) -> None:
    check_tensor(op, "x", x, "[B, C, H, W]", WITH_FLOAT64)
    check_tensor(op, "weight", weight, "[N, C, 3, 3]", WITH_FLOAT64)
    given = {"x": x, "weight": weight}
    if bias is not None:
        given["bias"] = check_tensor(op, "bias", bias, "[N]", WITH_FLOAT64)
    if residual is not None:
        given["residual"] = check_tensor(op, "residual", residual, "[B, N, h, w]", WITH_FLOAT64)
    check_same_device(op, **given)
    check_choice(op, "resize", resize, RESIZES)
    channels = x.shape[1]
    if channels == 0 or weight.shape[0] == 0 or weight.shape[1:] != (channels, 3, 3):
        raise ValueError(
            f"{op}: weight must have shape [N, C, 3, 3] with N >= 1 and C = {channels} >= 1, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"{op}: bias must have shape [N] with N = {weight.shape[0]}, got {tuple(bias.shape)}")
    fewest = 2 if resize == "down" else 1
    if x.shape[2] < fewest or x.shape[3] < fewest:
        raise ValueError(f"{op}: x must have at least {fewest} x {fewest} pixels, got {tuple(x.shape)}")
    shape = _result_shape(x, weight, resize)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"{op}: residual must have the result's shape {tuple(shape)}, got {tuple(residual.shape)}")
    dtype = reference.result_dtype(x)
    for name, factor in (("weight", weight), ("bias", bias)):
        if factor is not None and factor.dtype not in (dtype, torch.float32):
            raise TypeError(f"{op}: {name} must have dtype {dtype} or float32, got {factor.dtype}")
    if residual is not None and residual.dtype != dtype:
        raise TypeError(f"{op}: residual must have the result's dtype {dtype}, got {residual.dtype}")


def _check_packed(packed: Tensor, x: Tensor) -> None:
    dtype = reference.result_dtype(x)
    if not alike((packed,), 1, (dtype,), beside=x):
        is_tensor = isinstance(packed, Tensor)
        made = f"{packed.ndim} dimensions of {packed.dtype} on {packed.device}" if is_tensor else type(packed).__name__
        error = ValueError if is_tensor and packed.dtype == dtype else TypeError
        raise error(f"conv3x3: packed must be what conv3x3_pack made for {dtype} on {x.device}, got {made}")


def _result_shape(x: Tensor, weight: Tensor, resize: str) -> tuple[int, int, int, int]:
    batch, _, height, width = x.shape
    if resize == "down":
        height, width = height // 2, width // 2
    elif resize == "up":
        height, width = 2 * height, 2 * width
    return batch, weight.shape[0], height, width


@torch.library.register_fake("flexvar::conv3x3")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, resize: str, residual: Tensor | None, packed: Tensor | None
) -> Tensor:
    batch, channels, height, width = _result_shape(x, weight, resize)
    return x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


register_autocast("conv3x3", only=("x",))
