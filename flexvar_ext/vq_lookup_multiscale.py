"""Nearest codes of a latent at every scale of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexvar_ext._checks import check_bool, check_choice, check_size, is_readable
from flexvar_ext._registration import register_autocast
from flexvar_ext.resample2d import MODES
from flexvar_ext.vq_lookup import check_lookup_arguments, in_float32, raise_not_finite

_OP = "vq_lookup_multiscale"
_CHECKED = torch.ops.flexvar.vq_lookup_multiscale_checked.default
_MAX_TOKENS = 2**31  # 16 GiB of indices, more than a batch has: a mistyped size is refused rather than allocated


def vq_lookup_multiscale(
    latent: Tensor,
    codebook: Tensor,
    scales: Sequence[tuple[int, int]],
    *,
    normalize: bool = True,
    mode: str = "area",
    antialias: bool = False,
) -> Tensor:
    """The latent resampled to every scale and looked up: the multi-scale tokens of FlexVAR (arXiv 2502.20313).

    As ``vq_lookup(resample2d(latent, scale, mode=mode, antialias=antialias), codebook, normalize=normalize)`` for every
    scale, with the resampled latents in float32, in one call and without tensors between the steps.

    Args:
        latent: [B, C, H, W], float32, float16 or bfloat16; B may be 0, H and W not. Tokens whose window holds a NaN or
            an infinity get index 0.
        codebook: [V, C]; see :func:`flexvar_ext.vq_lookup`.
        scales: the (h, w) of every scale, each at least (1, 1), smaller or larger than the latent; B * L of them
            together below 2**31.
        normalize: compare directions instead of points.
        mode: "area", "bilinear", "bicubic" or "nearest"; see :func:`flexvar_ext.resample2d`.
        antialias: only with "bilinear".

    Returns: int64 [B, L] with L the sum of h * w: scale after scale, each row-major. There is no gradient.
    Raises: TypeError, ValueError: ``vq_lookup_multiscale: argument, rule, value got``.
    """
    check_lookup_arguments(_OP, "latent", "[B, C, H, W]", latent, codebook)
    check_bool(_OP, "normalize", normalize)
    check_bool(_OP, "antialias", antialias)
    check_choice(_OP, "mode", mode, MODES)
    if antialias and mode != "bilinear":
        raise ValueError(f"{_OP}: antialias must be False unless mode is bilinear, got mode {mode!r}")
    if latent.shape[2] < 1 or latent.shape[3] < 1:
        raise ValueError(f"{_OP}: latent must have H and W of at least 1, got shape {tuple(latent.shape)}")
    heights, widths = _sides(scales)
    tokens = latent.shape[0] * _num_tokens(heights, widths)
    if tokens >= _MAX_TOKENS:
        raise ValueError(
            f"{_OP}: scales must have fewer than 2**31 tokens, all images together, got {tokens} in {len(heights)} "
            f"scales of {latent.shape[0]} images"
        )
    arguments = in_float32(latent), in_float32(codebook), heights, widths, normalize, mode, antialias
    if not is_readable(codebook):
        unchecked: Tensor = torch.ops.flexvar.vq_lookup_multiscale(*arguments)
        return unchecked
    result: Tensor
    result, codebook_is_finite = _CHECKED(*arguments)
    if not codebook_is_finite:
        raise_not_finite(_OP, codebook)
    return result


def _sides(scales: object) -> tuple[list[int], list[int]]:
    if isinstance(scales, str) or not isinstance(scales, Sequence):
        raise TypeError(f"{_OP}: scales must be a sequence of (height, width), got {type(scales).__name__}")
    if len(scales) == 0:
        raise ValueError(f"{_OP}: scales must hold at least one (height, width), got {scales!r}")
    sizes = [check_size(_OP, "scales", scale) for scale in scales]
    return [height for height, _ in sizes], [width for _, width in sizes]


def _num_tokens(heights: Sequence[int], widths: Sequence[int]) -> int:
    return sum(height * width for height, width in zip(heights, widths, strict=True))


@torch.library.register_fake("flexvar::vq_lookup_multiscale")
def _fake_indices(
    latent: Tensor,
    codebook: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    normalize: bool,
    mode: str,
    antialias: bool,
) -> Tensor:
    return latent.new_empty((latent.shape[0], _num_tokens(heights, widths)), dtype=torch.int64)


@torch.library.register_fake("flexvar::vq_lookup_multiscale_checked")
def _(*arguments: Any) -> tuple[Tensor, bool]:
    return _fake_indices(*arguments), True


register_autocast("vq_lookup_multiscale", to=torch.float32)
