"""What training needs from a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class ImageDataset(Protocol):
    """Labelled images of one size, fetched in batches. Item i is the same image whenever it is asked for.

    A data set may have a ``fingerprint``, a string: a run is not resumed with one of another.
    """

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


def check_datasets(op: str, datasets: Sequence[ImageDataset], patch_size: int) -> None:
    """Raises ValueError unless there is a data set, each holds images, and patches of ``patch_size`` px cover them."""
    if not datasets or any(len(dataset) == 0 for dataset in datasets):
        raise ValueError(f"{op}: datasets must each hold at least one image, got none")
    for dataset in datasets:
        if dataset.height % patch_size or dataset.width % patch_size:
            raise ValueError(
                f"{op}: height and width of the images must be multiples of patch size {patch_size}, "
                f"got {dataset.height} and {dataset.width}"
            )


def describe(dataset: ImageDataset) -> dict[str, Any]:
    """What tells a data set from others without reading an image, as JSON values."""
    return {
        "height": int(dataset.height),
        "width": int(dataset.width),
        "length": len(dataset),
        "class_names": list(dataset.class_names),
        "fingerprint": getattr(dataset, "fingerprint", None),
    }


def shares(datasets: Sequence[ImageDataset]) -> NDArray[np.float64]:
    """The part of all images that each data set holds: how often a batch comes from it."""
    lengths = np.array([len(dataset) for dataset in datasets], np.float64)
    return lengths / lengths.sum()
