"""What stands in for pixels that are to be painted while the picture around them is encoded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fill_painted(pixels: Tensor, paint: Tensor) -> Tensor:
    """Continues the known pixels smoothly into those to paint.

    The encoder sees beyond the cell that it encodes, so what lies under the mask would tint the codes around it. Each
    pixel to paint becomes a mean of known pixels, over a window that widens with their distance (push-pull, Gortler
    et al., "The Lumigraph", 1996): whatever it held before is forgotten.

    Args:
        pixels: float [B, 3, H, W].
        paint: bool [B, 1, H, W] with the same B, True where to paint.

    Returns:
        Like ``pixels``, and equal where ``paint`` is False; 0 everywhere in an image without a known pixel.
    """
    known = (~paint).to(pixels.dtype)
    return torch.where(paint, _push_pull(pixels * known, known), pixels)


def _push_pull(colour: Tensor, weight: Tensor) -> Tensor:
    """``colour`` is premultiplied by ``weight``, the known part of each pixel; half the resolution gives the rest."""
    size = colour.shape[2:]
    if max(size) == 1:
        return colour / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    halves = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (colour, weight))
    coarser = F.interpolate(_push_pull(*halves), size, mode="bilinear")
    return colour + (1 - weight) * coarser
