"""Shapes drawn on demand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexvar.data.render import render_batch
from flexvar.data.shapes import SHAPE_NAMES


class ShapeDataset:
    """Coloured shapes of twelve classes; nothing is stored, image i is a function of (seed, i, height, width).

    Args:
        length: number of images; classes take turns, image i is of class i mod 12.
        height, width: size in pixels, 8 to 4096.
        seed: any integer >= 0. Different seeds share no image.
    """

    class_names = SHAPE_NAMES

    def __init__(self, length: int, height: int = 64, width: int = 64, seed: int = 0) -> None:
        if length < 0:
            raise ValueError(f"ShapeDataset: length must be >= 0, got {length}")
        if seed < 0:
            raise ValueError(f"ShapeDataset: seed must be >= 0, got {seed}")
        self.length, self.height, self.width, self.seed = length, height, width, seed
        self.batch([])  # reports a bad size now rather than at the first image

    @property
    def fingerprint(self) -> str:
        """Tells it from data sets of the same size and length."""
        return f"seed {self.seed}"

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """uint8 [N, 3, height, width] and int64 [N]. Raises IndexError for an index outside [0, length)."""
        for index in indices:
            if not 0 <= index < self.length:
                raise IndexError(f"ShapeDataset: index must be in [0, {self.length}), got {index}")
        labels = [index % len(SHAPE_NAMES) for index in indices]
        rngs = [np.random.default_rng((self.seed, index)) for index in indices]
        images = torch.from_numpy(render_batch(labels, self.height, self.width, rngs))
        return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64)
