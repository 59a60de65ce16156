"""Every op of :mod:`flexvar_ext` in plain PyTorch: the specification.

Slow and clear on purpose. Each function has the name, arguments and result of the native op. Nothing falls back to this
file silently: call it by name, or build a model with ``backend="reference"``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "embed_resample",
    "guided_sample",
    "resample2d",
    "scale_attention",
    "scale_attention_step",
    "vq_lookup",
    "vq_lookup_multiscale",
]


def vq_lookup(latents: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """[N, C], [V, C] -> int64 [N]: the code at the smallest Euclidean distance, the lowest index on ties."""
    x, codes = latents.float(), codebook.float()
    if normalize:
        x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
    if codes.shape[0] == 0:
        raise ValueError("vq_lookup: codebook must hold at least one code, got shape (0, C)")
    squared_distance = x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.T
    return squared_distance.argmin(dim=1)


def resample2d(x: Tensor, size: tuple[int, int], *, mode: str, antialias: bool = False) -> Tensor:
    """[B, C, H, W] -> [B, C, h, w], as ``torch.nn.functional.interpolate`` with ``align_corners=False``."""
    if mode in ("nearest", "area"):
        return F.interpolate(x, size=size, mode=mode)
    return F.interpolate(x, size=size, mode=mode, align_corners=False, antialias=antialias)


def vq_lookup_multiscale(
    latent: Tensor,
    codebook: Tensor,
    scales: Sequence[tuple[int, int]],
    *,
    normalize: bool = True,
    mode: str = "area",
    antialias: bool = False,
) -> Tensor:
    """[B, C, H, W] -> int64 [B, L]: the latent resampled to every scale and looked up, scale after scale, row-major."""
    batch, channels = latent.shape[:2]
    tokens = []
    for height, width in scales:
        resampled = resample2d(latent.float(), (height, width), mode=mode, antialias=antialias)
        flat = resampled.permute(0, 2, 3, 1).reshape(-1, channels)
        tokens.append(vq_lookup(flat, codebook, normalize=normalize).view(batch, height * width))
    return torch.cat(tokens, dim=1)


def embed_resample(
    indices: Tensor,
    codebook: Tensor,
    size: tuple[int, int],
    *,
    normalize: bool = True,
    mode: str = "bicubic",
) -> Tensor:
    """int64 [B, h0, w0] -> tokens [B, h*w, C]: look codes up, resample the grid, lay it out as tokens."""
    codes = F.normalize(codebook.float(), dim=-1).to(codebook.dtype) if normalize else codebook
    grid = F.embedding(indices, codes).permute(0, 3, 1, 2)
    return resample2d(grid, size, mode=mode).flatten(2).transpose(1, 2)


def scale_attention(
    q: Tensor, k: Tensor, v: Tensor, scale_lengths: Sequence[int], *, softmax_scale: float | None = None
) -> Tensor:
    """[B, L, H, D] each -> [B, L, H, D]: a token of scale i attends to every token of the scales <= i."""
    scale_of_token = torch.repeat_interleave(
        torch.arange(len(scale_lengths), device=q.device), torch.tensor(scale_lengths, device=q.device)
    )
    visible = scale_of_token[:, None] >= scale_of_token[None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, scale=softmax_scale
    )
    return out.transpose(1, 2)


def scale_attention_step(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_length: int, *, softmax_scale: float | None = None
) -> Tensor:
    """[B, l, H, D], caches [B, L_max, H, D] -> [B, l, H, D]: attention to the first ``kv_length`` cached tokens."""
    k, v = k_cache[:, :kv_length], v_cache[:, :kv_length]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=softmax_scale
    )
    return out.transpose(1, 2)
