"""Losses of the trainers. Each takes tensors and returns a scalar."""

from __future__ import annotations

from torch import Tensor


def reconstruction_loss(difference: Tensor) -> Tensor:
    """L1 plus L2 of ``decoded - image``, [B, 3, H, W]: L1 for sharpness, L2 for what is far off."""
    return difference.abs().mean() + difference.square().mean()


def gradient_loss(difference: Tensor) -> Tensor:
    """L1 between image gradients, from ``decoded - image``, [B, 3, H, W]: edges stay edges. A side of 1 has none."""
    means = [difference.diff(dim=dim).abs().mean() for dim in (2, 3) if difference.shape[dim] > 1]
    return sum(means, start=difference.new_zeros(()))
