"""Losses of the trainers. Each takes tensors and returns a scalar."""

from __future__ import annotations

from torch import Tensor


def reconstruction_loss(difference: Tensor) -> Tensor:
    """L1 plus L2 of ``decoded - image``, [B, 3, H, W]: L1 for sharpness, L2 for what is far off."""
    return difference.abs().mean() + difference.square().mean()


def gradient_loss(difference: Tensor) -> Tensor:
    """L1 between image gradients, from ``decoded - image``, [B, 3, H, W] with both sides above 1: edges stay edges."""
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
