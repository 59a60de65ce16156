"""Nearest code of a codebook."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from flexvar_ext._checks import alike, check_bool, check_same_device, check_tensor, is_readable
from flexvar_ext._registration import register_autocast

# Looked up once, and no cast of what is float32: both take a good part of a small call's time with cold caches.
_CHECKED = torch.ops.flexvar.vq_lookup_checked.default


def vq_lookup(latents: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """Index of the nearest code by Euclidean distance, the lowest index on ties.

    ``argmin_v |x_n - e_v|²`` with ``x = latents / max(|latents|, 1e-12)`` and ``e`` likewise when ``normalize``, as in
    the quantiser of VQ-16 tokenizers (LlamaGen, arXiv 2406.06525; FlexVAR, arXiv 2502.20313).

    The rows are normalised to float32; codes that float32 arithmetic (on a GPU: tensor cores) cannot tell apart within
    its error bound are compared in float64. So the result is the code nearest to these float32 rows, and does not
    depend on device, instruction set, thread count or the other rows. No [N, V] matrix is written.

    Args:
        latents: [N, C], float32, float16 or bfloat16; N may be 0. A row that holds a NaN or an infinity gets index 0.
        codebook: [V, C] with V >= 1, same dtypes, on the same device. On a CPU a code that holds a NaN or an infinity
            is an error. On a CUDA device, where looking would make the host wait, and under ``torch.compile`` it is
            never chosen, unless no code is finite: then every index is 0.
        normalize: compare directions instead of points.

    Returns: int64 [N]. There is no gradient.
    Raises: TypeError, ValueError: ``vq_lookup: argument, rule, value got``.
    """
    check_lookup_arguments("vq_lookup", "latents", "[N, C]", latents, codebook)
    check_bool("vq_lookup", "normalize", normalize)
    x, codes = in_float32(latents), in_float32(codebook)
    if not is_readable(codebook):
        unchecked: Tensor = torch.ops.flexvar.vq_lookup(x, codes, normalize)
        return unchecked
    result: Tensor
    result, codebook_is_finite = _CHECKED(x, codes, normalize)
    if not codebook_is_finite:
        raise_not_finite("vq_lookup", codebook)
    return result


def check_lookup_arguments(op: str, name: str, layout: str, latents: Tensor, codebook: Tensor) -> None:
    """``latents`` has its C components in dimension 1."""
    if not (alike((latents,), layout.count(",") + 1) and alike((codebook,), 2, beside=latents)):
        check_tensor(op, name, latents, layout)
        check_tensor(op, "codebook", codebook, "[V, C]")
        check_same_device(op, **{name: latents, "codebook": codebook})
    codes, channels = codebook.shape
    if codes < 1:
        raise ValueError(f"{op}: codebook must hold at least one code, got shape {tuple(codebook.shape)}")
    if channels < 1 or channels != latents.shape[1]:
        raise ValueError(
            f"{op}: codebook must have shape [V, C] with C = {latents.shape[1]} >= 1 as in {name}, "
            f"got {tuple(codebook.shape)}"
        )


def in_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def raise_not_finite(op: str, codebook: Tensor) -> NoReturn:
    bad = int((~codebook.isfinite()).any(dim=1).sum())
    raise ValueError(f"{op}: codebook must be finite, got {bad} codes with a NaN or an infinity")


@torch.library.register_fake("flexvar::vq_lookup")
def _(latents: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=torch.int64)


@torch.library.register_fake("flexvar::vq_lookup_checked")
def _(latents: Tensor, codebook: Tensor, normalize: bool) -> tuple[Tensor, bool]:
    return latents.new_empty(latents.shape[0], dtype=torch.int64), True


register_autocast("vq_lookup", to=torch.float32)
