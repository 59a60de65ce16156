"""The user's own pictures: one sub-folder for each class."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flexvar.image_io import open_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageFolder:
    """Pictures in ``root/<class name>/**``, turned upright, cropped at the centre and resized to height × width.

    Classes are the sub-folders in alphabetical order. Files that are hidden or no pictures are left out.

    Args:
        root: the folder.
        height, width: size in pixels of the images returned.

    Raises:
        ValueError: root is no folder, has no sub-folders, one of them holds no pictures, or a picture is no file, as a
            link to nothing.
    """

    def __init__(self, root: str | Path, height: int = 64, width: int = 64) -> None:
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"ImageFolder: root must be a folder, got {str(root)!r}")
        if height < 1 or width < 1:
            raise ValueError(f"ImageFolder: height and width must be >= 1, got {height} and {width}")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise ValueError(f"ImageFolder: root must hold one sub-folder for each class, got none in {str(root)!r}")
        self.root, self.height, self.width = root, height, width
        self.class_names = tuple(folder.name for folder in folders)
        self.items = [(path, label) for label, folder in enumerate(folders) for path in _pictures(folder)]
        labels = {label for _, label in self.items}
        empty = [folder.name for label, folder in enumerate(folders) if label not in labels]
        if empty:
            raise ValueError(
                f"ImageFolder: every sub-folder must hold pictures ({' '.join(SUFFIXES)}), got none in {empty}"
            )

    @property
    def fingerprint(self) -> str:
        """CRC-32 of the pictures' paths below root, in their order."""
        crc = 0
        for path, _ in self.items:
            crc = zlib.crc32(os.fsencode(path.relative_to(self.root).as_posix()) + b"\0", crc)
        return f"{crc:08x}"

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """uint8 [N, 3, height, width] and int64 [N]. Raises ValueError for a file that is not a readable picture."""
        images = np.empty((len(indices), self.height, self.width, 3), np.uint8)
        labels = []
        for image, index in zip(images, indices, strict=True):
            path, label = self.items[index]
            image[...] = self._read(path)
            labels.append(label)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64)

    def _read(self, path: Path) -> np.ndarray:
        picture = open_image(path)
        return np.asarray(ImageOps.fit(picture, (self.width, self.height), Image.Resampling.LANCZOS))


def _pictures(folder: Path) -> list[Path]:
    """The files in a folder and those below that are named as pictures are. Raises ValueError for what is no file."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or path.is_dir():
            continue
        if not path.is_file():
            what = "a link to nothing" if path.is_symlink() else "something else"
            raise ValueError(f"ImageFolder: pictures must be files, got {what}: {str(path)!r}")
        found.append(path)
    return found
