"""Known pixels back into a generated picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def paste_known(generated: Tensor, original: Tensor, paint: Tensor, feather: int) -> Tensor:
    """The generated picture where it was painted, the original elsewhere, bit for bit.

    Args:
        generated: float [B, 3, H, W].
        original: the same, or with B = 1.
        paint: bool [B, 1, H, W] or [1, 1, H, W], True where ``generated`` counts.
        feather: width in pixels of a band outside the painted region, where the one fades into the other: at distance
            d (the larger of its two coordinates) the original counts d / (feather + 1).
    """
    weight = grown = paint.to(generated.dtype)
    for _ in range(feather):
        grown = F.max_pool2d(grown, 3, stride=1, padding=1)
        weight = weight + grown
    return torch.lerp(original.expand_as(generated), generated, (weight / (feather + 1)).expand_as(generated))
