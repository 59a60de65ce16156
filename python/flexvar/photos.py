"""Pictures that commands read: files, folders of them, and their fingerprints."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image

from flexvar._numbers import check_integer
from flexvar.image_io import open_image

T = TypeVar("T")


def read_with_fingerprint(path: Path, read: Callable[[BinaryIO], T]) -> tuple[T, str]:
    """What ``read`` makes of a file, and the SHA-256 of the same bytes. Raises OSError, and what ``read`` raises."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        file.seek(0)
        return read(file), digest.hexdigest()


def shrink(picture: Image.Image, name: str, max_side: int, *, op: str) -> Image.Image:
    """A picture of at most ``max_side`` pixels a side (0: as it is); shrinking is said on stderr.

    Raises:
        TypeError, ValueError: ``max_side`` is no int, or below 0; the text begins with ``op``.
    """
    check_integer("--max-side", max_side, 0, op=op)
    if not max_side or max(picture.size) <= max_side:
        return picture
    small = picture.copy()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    print(
        f"flexvar: note: {name} was shrunk from {picture.width} x {picture.height} to {small.width} x {small.height}; "
        "--max-side 0 keeps it",
        file=sys.stderr,
    )
    return small


def open_photo(path: Path, max_side: int, *, op: str) -> Image.Image:
    """A picture, shrunk as :func:`shrink` does."""
    return shrink(open_image(path), path.name, max_side, op=op)


def list_photos(path: Path) -> list[Path]:
    """A file as it is; of a folder, every file whose name ends like a picture's, by name.

    Raises:
        ValueError: a folder without pictures.
    """
    if not path.is_dir():
        return [path]
    endings = Image.registered_extensions()
    photos = sorted(file for file in path.iterdir() if file.suffix.lower() in endings and not file.name.startswith("."))
    if not photos:
        raise ValueError(f"{path} must be a picture or a folder with pictures, got a folder without one")
    return photos


def mask_of(photo: Path, masks: Path) -> Path:
    """The mask of a photo: ``masks`` itself, or in a folder the file of the photo's name, whatever its ending.

    Raises:
        ValueError: the folder has none, or several.
    """
    if not masks.is_dir():
        return masks
    found = [file for file in list_photos(masks) if file.stem == photo.stem]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{masks} must hold one mask for {photo.name}, called {photo.stem}, got {names}")
    return found[0]
