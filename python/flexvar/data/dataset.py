"""What training needs from a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class ImageDataset(Protocol):
    """Labelled images of one size, fetched in batches. Item i is the same image whenever it is asked for."""

    height: int
    width: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images (uint8 [N, 3, height, width]) and labels (int64 [N]) at the given indices."""
        ...


def to_model_range(images: Tensor) -> Tensor:
    """uint8 images to the float32 in [-1, 1] that the tokenizer takes; any shape."""
    return images.float() / 127.5 - 1
