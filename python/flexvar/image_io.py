"""Pictures in and out: photographs to tensors, tensors to PNG files that carry their settings, grids.

Tensors are float32 [B, 3, H, W], RGB, in [-1, 1]: a byte p is the value p / 127.5 - 1.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from flexvar._files import write_atomically

__all__ = [
    "MAX_PIXELS",
    "image_to_tensor",
    "make_grid",
    "open_image",
    "open_mask",
    "read_settings",
    "save_png",
    "tensor_to_images",
]

#: Largest picture read by default, in pixels: where Pillow, too, starts to warn of a decompression bomb.
MAX_PIXELS = 89_478_485

#: Formats that Pillow reads by running another program on the file, or through the operating system's own renderer; and
#: one of icons, in which whole other files lie, of any size.
_REFUSED_FORMATS = {"EPS", "WMF", "ICNS"}

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_SETTINGS_KEY = "flexvar"


def open_image(
    source: str | os.PathLike[str] | BinaryIO | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Reads any picture that Pillow reads as an upright 8-bit RGB image.

    EXIF orientation is applied; transparency is laid over white; of an animation the first frame is taken; 16-bit grey
    keeps its range (65535 is white); integers beyond 16 bits and floats, which have no agreed white, are stretched from
    their smallest to their largest value. Colour profiles are not applied.

    Args:
        source: a path, an open binary file, or a Pillow image (left as it is).
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a picture, is damaged, or has more than ``max_pixels`` pixels.
    """
    return _open(source, max_pixels, _to_rgb)


def open_mask(source: str | os.PathLike[str] | BinaryIO | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads any picture that Pillow reads as an upright 8-bit grey image (mode "L"), transparency as black.

    Everything else is as in :func:`open_image`.
    """
    return _open(source, max_pixels, lambda image: _to_rgb(image, backdrop="black").convert("L"))


_Conversion = Callable[[Image.Image], Image.Image]


def _open(
    source: str | os.PathLike[str] | BinaryIO | Image.Image, max_pixels: int, convert: _Conversion
) -> Image.Image:
    if isinstance(source, Image.Image):
        return _upright(source, "image", max_pixels, convert)
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return _decode(file, os.fspath(source), max_pixels, convert)
    return _decode(source, str(getattr(source, "name", "file")), max_pixels, convert)


def _decode(file: BinaryIO, name: str, max_pixels: int, convert: _Conversion) -> Image.Image:
    Image.init()
    formats = [known for known in Image.ID if known not in _REFUSED_FORMATS]
    if not file.seekable():
        file = io.BytesIO(file.read())
    _check_icon(file, name, max_pixels)
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"open_image: {name} must be a picture that Pillow reads, got another format") from error
    except Exception as error:  # Pillow's format plugins raise nearly anything on a damaged header
        raise ValueError(f"open_image: {name} must be a picture that Pillow reads, got: {error}") from error
    with image:
        return _upright(image, name, max_pixels, convert)


def _upright(image: Image.Image, name: str, max_pixels: int, convert: _Conversion) -> Image.Image:
    _check_pixels(image, name, max_pixels)
    try:
        image.load()
        converted = convert(ImageOps.exif_transpose(image))
    except Exception as error:  # as above: truncated data, broken EXIF, a mode without a way to RGB
        raise ValueError(f"open_image: {name} must be an undamaged picture, got: {error}") from error
    _check_pixels(converted, name, max_pixels)  # containers of several sizes settle on one only when they are decoded
    return converted


def _check_icon(file: BinaryIO, name: str, max_pixels: int) -> None:
    """The pictures of a Windows icon: Pillow decodes one as it opens the file, whatever size the icon's entry says."""
    start = file.read(6)
    for entry in range(int.from_bytes(start[4:6], "little") if start.startswith(b"\0\0\1\0") else 0):
        file.seek(6 + 16 * entry + 12)
        file.seek(int.from_bytes(file.read(4), "little"))
        head = file.read(24)  # of a PNG, or of a bitmap without its file header
        if head.startswith(_PNG_SIGNATURE):
            width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
        else:
            width, height = (abs(int.from_bytes(head[i : i + 4], "little", signed=True)) for i in (4, 8))
            height //= 2  # that of picture and mask together
        if width * height > max_pixels:
            raise ValueError(f"open_image: {name} must have 1 to {max_pixels} pixels, got {width} x {height}")
    file.seek(0)


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1 or width * height > max_pixels:
        raise ValueError(f"open_image: {name} must have 1 to {max_pixels} pixels, got {width} x {height}")


def _to_rgb(image: Image.Image, backdrop: str = "white") -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_grey_to_rgb(np.asarray(image))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, backdrop), layers).convert("RGB")
    return image.convert("RGB")


def _wide_grey_to_rgb(values: np.ndarray[Any, Any]) -> Image.Image:
    grey = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = grey.min(), grey.max()
    if np.issubdtype(values.dtype, np.integer) and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (grey - low) / (high - low if high > low else 1.0) * 255
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


def image_to_tensor(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """One RGB image, or several of one size -> float32 [B, 3, H, W] in [-1, 1].

    Raises:
        TypeError: something is not a Pillow image.
        ValueError: there is no image, or the sizes differ.
    """
    batch = [images] if isinstance(images, Image.Image) else list(images)
    for image in batch:
        if not isinstance(image, Image.Image):
            raise TypeError(f"image_to_tensor: images must be Pillow images, got {type(image).__name__}")
    if len({image.size for image in batch}) != 1:
        raise ValueError(f"image_to_tensor: images must be one or more of one size, got {[i.size for i in batch]}")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in batch])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def tensor_to_images(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] (values beyond are clipped) -> RGB images; the inverse of :func:`image_to_tensor`.

    Raises:
        ValueError: wrong shape, or values that are not finite.
    """
    return [Image.fromarray(pixels) for pixels in tensor_to_uint8(images)]


def tensor_to_uint8(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[B, 3, H, W] in [-1, 1] (values beyond are clipped) -> bytes [B, H, W, 3]. Raises as :func:`tensor_to_images`."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"tensor_to_images: images must have shape [B, 3, H, W], got {tuple(images.shape)}")
    values = images.detach().float()
    if not torch.isfinite(values).all():
        raise ValueError("tensor_to_images: images must be finite, got NaN or infinity")
    return values.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def save_png(
    image: Image.Image,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a PNG whole or not at all, with ``settings`` (anything JSON holds) in the text chunk ``flexvar``.

    Raises:
        ValueError: the path does not end in ``.png``.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"save_png: path must end in .png, got {target.name!r}")
    chunks = PngImagePlugin.PngInfo()
    if settings is not None:
        chunks.add_text(_SETTINGS_KEY, json.dumps(dict(settings)))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=chunks)
    write_atomically(target, encoded.getvalue())


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that :func:`save_png` stored in a PNG.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a PNG, or holds no settings.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=["PNG"]) as image:
                text = image.info.get(_SETTINGS_KEY)
            settings = json.loads(text) if isinstance(text, str) else None
        except UnidentifiedImageError as error:
            raise ValueError(f"read_settings: {name} must be an undamaged PNG, got another format") from error
        except Exception as error:  # as in open_image
            raise ValueError(f"read_settings: {name} must be an undamaged PNG, got: {error}") from error
    if type(settings) is not dict:
        raise ValueError(f"read_settings: {name} must be a PNG written by flexvar, got one without its settings")
    return settings


def make_grid(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    gap: int = 4,
) -> Image.Image:
    """Images of any sizes on a white sheet, row by row, each centred in a cell of the largest size.

    Args:
        images: at least one.
        columns: cells a row; by default about as many as there are rows.
        captions: a line under each image.
        gap: white pixels around each cell.

    Raises:
        ValueError: no image, fewer than one column, or not one caption per image.
    """
    if not images:
        raise ValueError("make_grid: images must hold at least one image, got none")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"make_grid: columns must be at least 1, got {columns}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"make_grid: captions must be one per image ({len(images)}), got {len(captions)}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    font = ImageFont.load_default()
    line = 0 if captions is None else 16
    text_width = 0 if captions is None else max(int(font.getlength(text)) for text in captions)
    width = max(text_width, *(image.width for image in images)) + gap
    height = max(image.height for image in images) + line + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = gap + i % columns * width, gap + i // columns * height
        cell_width, cell_height = width - gap, height - gap - line
        sheet.paste(
            image,
            (
                left + (cell_width - image.width) // 2,
                top + (cell_height - image.height) // 2,
            ),
        )
        if captions is not None:
            draw.text(
                (left + cell_width / 2, top + cell_height + 2),
                captions[i],
                fill="black",
                font=font,
                anchor="ma",
            )
    return sheet
