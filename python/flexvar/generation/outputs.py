"""What a generation gives back: every step, and the finished images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from flexvar.image_io import tensor_to_images, tensor_to_uint8
from flexvar.schedule import Size

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)

#: "pil": a list of RGB images. "np": uint8 [B, H, W, 3]. "pt": float32 [B, 3, H, W], about in [-1, 1], not clamped.
#: "latent": the codes [B, codebook_dim, h, w] that the decoder reads.
Images = list[Image.Image] | np.ndarray[Any, np.dtype[np.uint8]] | Tensor


@dataclass(frozen=True)
class GenerationStep:
    """One step of a batch of images: each is the whole image at this step's resolution.

    Attributes:
        index: of this step, from 0.
        num_steps: of the whole schedule.
        size: (h, w) of this step, in tokens.
        indices: int64 [B, h, w], the codes.
        image_size: (height, width) of the preview, in pixels.
    """

    index: int
    num_steps: int
    size: Size
    indices: Tensor
    image_size: Size
    _decode: Callable[[Tensor, Size, str], Images] = field(repr=False, compare=False)

    def preview(self, output_type: OutputType = "pil") -> Images:
        """This step decoded; of the last step, the finished images. For the types see :data:`Images`.

        Raises:
            ValueError: an unknown output type, or the decoder gives NaN or infinity ("pil" and "np").
        """
        return self._decode(self.indices, self.image_size, check_output_type(output_type))


@dataclass(frozen=True)
class GenerationOutput:
    """Finished images and how they came about.

    Attributes:
        images: in the output type asked for, see :data:`Images`.
        steps: every step, decodable on its own.
    """

    images: Images
    steps: list[GenerationStep]

    @property
    def pyramid(self) -> list[Tensor]:
        """The codes of every step, int64 [B, h_i, w_i]."""
        return [step.indices for step in self.steps]


def convert_images(decoded: Tensor, output_type: str) -> Images:
    """What "pt" or "latent" gives as the output type asked for. Raises ValueError for NaN or infinity in pictures."""
    if output_type in ("pt", "latent"):
        return decoded
    return tensor_to_images(decoded) if output_type == "pil" else tensor_to_uint8(decoded)


def check_output_type(output_type: str) -> str:
    """The argument, or a ValueError."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"generate: output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r:.100}")
    return output_type
