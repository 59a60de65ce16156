"""Pictures and masks as users have them -> tensors of one form."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flexvar._checks import describe
from flexvar.image_io import image_to_tensor, open_image, open_mask
from flexvar.schedule import Size

#: A picture: a Pillow image, the path of a file, or several of one size; or a float tensor [3, H, W] or [B, 3, H, W] in
#: [-1, 1]. Files and Pillow images become upright RGB over white, as :func:`flexvar.image_io.open_image` says.
Picture = Image.Image | str | os.PathLike[str]
Pictures = Picture | Sequence[Picture] | Tensor

#: A mask, white where to paint: a Pillow image, the path of a file, or several (transparent is black); or an array or
#: tensor [H, W], [B, H, W] or [B, 1, H, W] of bools, of bytes from 0 to 255 or of floats from 0 to 1.
Masks = Picture | Sequence[Picture] | Tensor | np.ndarray[Any, Any]

# Decoded images overshoot [-1, 1] a little and may be edited again; bytes and [0, 255] are caught all the same.
_LARGEST_VALUE = 2.0
_PICTURE_TYPES = (Image.Image, str, os.PathLike)


def to_pixels(op: str, images: Pictures) -> Tensor:
    """Any :data:`Pictures` -> float32 [B, 3, H, W] in [-1, 1], on the device they are on.

    Raises:
        OSError: a file cannot be read.
        TypeError, ValueError: something else than pictures of one size, or values that are not finite or beyond range.
    """
    if not isinstance(images, Tensor):
        return image_to_tensor([open_image(image) for image in _listed(op, "image", images)])
    if not images.is_floating_point():
        raise TypeError(f"{op}: image must be floating point in [-1, 1] where it is a tensor, got {describe(images)}")
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape:
        raise ValueError(f"{op}: image must have shape [3, H, W] or [B, 3, H, W], got {tuple(images.shape)}")
    pixels = images.detach().float().reshape(-1, *images.shape[-3:])
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError(f"{op}: image must be finite, got NaN or infinity")
    if float(pixels.abs().max()) > _LARGEST_VALUE:
        low, high = (float(bound) for bound in pixels.aminmax())
        raise ValueError(f"{op}: image must be in [-1, 1], got values from {low:.4g} to {high:.4g}")
    return pixels


def to_paint(op: str, masks: Masks, size: Size) -> Tensor:
    """Any :data:`Masks` -> bool [B, 1, H, W], True where to paint; other sizes are resampled, 0.5 and above is white.

    Raises as :func:`to_pixels`.
    """
    if isinstance(masks, np.ndarray):
        masks = torch.from_numpy(masks.copy())  # torch takes no flipped views, and warns of those it may not write to
    if isinstance(masks, Tensor):
        levels = _levels(op, masks)
    else:
        grey = [torch.from_numpy(np.array(open_mask(mask))) for mask in _listed(op, "mask", masks)]
        levels = torch.cat([_resized(mask[None, None].float() / 255, size) for mask in grey])
    return _resized(levels, size) >= 0.5


def pad_to(pixels: Tensor, size: Size) -> Tensor:
    """[B, C, H, W] -> [B, C, *size]: continued to the right and below with the pixels of the edge."""
    return F.pad(pixels, (0, size[1] - pixels.shape[3], 0, size[0] - pixels.shape[2]), mode="replicate")


def pad_to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> the same with sides that are multiples of ``patch_size``, continued as by :func:`pad_to`."""
    height, width = (-(-side // patch_size) * patch_size for side in pixels.shape[2:])
    return pad_to(pixels, (height, width))


def _listed(op: str, name: str, pictures: Any) -> list[Picture]:
    is_one = isinstance(pictures, _PICTURE_TYPES) or not isinstance(pictures, Iterable)
    listed = [pictures] if is_one else list(pictures)
    for picture in listed:
        if not isinstance(picture, _PICTURE_TYPES):
            raise TypeError(f"{op}: {name} must be a picture, a path or a tensor, got {type(picture).__name__}")
    if not listed:
        raise ValueError(f"{op}: {name} must hold at least one picture, got none")
    return listed


def _levels(op: str, mask: Tensor) -> Tensor:
    """A mask of any dtype and shape -> float32 [B, 1, H, W] from 0 to 1."""
    if mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1) or 0 in mask.shape:
        raise ValueError(f"{op}: mask must have shape [H, W], [B, H, W] or [B, 1, H, W], got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and mask.dtype != torch.uint8 and not mask.is_floating_point():
        raise TypeError(f"{op}: mask must be of bools, bytes or floats, got {describe(mask)}")
    levels = mask.detach().float().reshape(-1, 1, *mask.shape[-2:])
    low, high = (float(bound) for bound in levels.aminmax())
    if mask.dtype == torch.uint8:
        if high == 1:  # nothing would be painted
            raise ValueError(f"{op}: mask must use bytes from 0 to 255, got 0 and 1 only; for these pass bools")
        return levels / 255
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{op}: mask must be from 0 to 1 where it is of floats, got {low:.4g} to {high:.4g}")
    return levels


def _resized(levels: Tensor, size: Size) -> Tensor:
    if tuple(levels.shape[2:]) == size:
        return levels
    return F.interpolate(levels, size, mode="bilinear", antialias=True)
