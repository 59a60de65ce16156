"""What can be set about a generation, once for every method that generates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from flexvar._numbers import check_integer
from flexvar.generation.guidance import GuidanceStyle, check_guidance
from flexvar.schedule import ScaleSchedule, Size

DEFAULT_GRID = 16  # tokens a side: what the paper's main presets end in
_LARGEST_TOP_K = (1 << 63) - 1  # guided_sample's
_LARGEST_IMAGE = 1 << 28  # pixels, 16384 x 16384: a mistyped number is refused rather than drawn for days


@dataclass(frozen=True)
class Layout:
    """Where everything goes.

    Attributes:
        schedule: the (h, w) of every step, in tokens.
        image_size: (height, width) of the finished image in pixels; at most its last grid's, which it is cropped from.
    """

    schedule: ScaleSchedule
    image_size: Size

    def preview_size(self, step: int) -> Size:
        """(height, width) in pixels of a step's picture, cropped by the same part as the finished image."""
        sides = zip(self.schedule[step], self.schedule.final_size, self.image_size, strict=True)
        height, width = (-(-side * image_side // last_side) for side, last_side, image_side in sides)
        return height, width


@dataclass(frozen=True)
class GenerationSettings:
    """What can be set about a generation. The defaults are the paper's; a model may bring some of its own.

    Attributes:
        schedule: the (h, w) of every step, in tokens: a :class:`ScaleSchedule`, or a list of sides or (h, w) pairs.
        height, width: of the image in pixels. Any size: what is not a multiple of the patch size is generated on the
            next larger grid and cropped. One alone means a square, none 16 x 16 tokens or the schedule's last grid. At
            most 2**28 pixels.
        steps: how many, where no schedule is given; as :meth:`ScaleSchedule.for_image` says unless set: 10, and more
            for images beyond 20 x 20 tokens.
        guidance_scale, guidance_style: see :func:`~flexvar.generation.guidance.guidance_weights`; at most 1e30.
        top_k: draw among the k likeliest codes; 0 is all, 1 always takes the likeliest; at most 2**63 - 1.
        top_p: then among the likeliest that together have this probability; 0 and 1 are all.
        published_greedy_quirk: take the likeliest code, whatever ``top_k``, at steps with a side other than 1 2 3 4 5 6
            8 10 13 16 23 24 32, as the released code does; needed to reproduce published figures.
        autocast_dtype: compute in torch.bfloat16 or torch.float16, the weights staying as they are: float32, or of it.

    Raises:
        TypeError, ValueError: a value breaks its rule; the text names it.
    """

    schedule: ScaleSchedule | Iterable[int | Iterable[int]] | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float = 2.5
    guidance_style: GuidanceStyle = "var"
    top_k: int = 900
    top_p: float = 0.95
    published_greedy_quirk: bool = False
    autocast_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, ScaleSchedule):
            object.__setattr__(self, "schedule", ScaleSchedule(self.schedule))
        if self.schedule is not None and self.steps is not None:
            raise ValueError(f"generate: steps must be left out where a schedule is given, got {self.steps}")
        # Kept as ints: those of numpy wrap around in products and sums.
        for name in ("height", "width", "steps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_integer(name, getattr(self, name), 1, op="generate"))
        check_guidance(self.guidance_scale, self.guidance_style)
        object.__setattr__(self, "top_k", check_integer("top_k", self.top_k, 0, _LARGEST_TOP_K, op="generate"))
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, int | float):
            raise TypeError(f"generate: top_p must be a number, got {self.top_p!r:.100}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"generate: top_p must be from 0 to 1, got {self.top_p!s:.100}")
        if not isinstance(self.published_greedy_quirk, bool):
            raise TypeError(
                f"generate: published_greedy_quirk must be a bool, got {self.published_greedy_quirk!r:.100}"
            )
        if self.autocast_dtype is not None and not isinstance(self.autocast_dtype, torch.dtype):
            raise TypeError(f"generate: autocast_dtype must be a torch.dtype or None, got {self.autocast_dtype!r:.100}")
        if self.autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"generate: autocast_dtype must be torch.bfloat16, torch.float16 or None, got {self.autocast_dtype}"
            )

    def layout(self, patch_size: int) -> Layout:
        """Schedule and image size, whichever way they were given.

        Raises:
            ValueError: the image needs another last grid than the schedule's, or is too large.
        """
        schedule = self.schedule
        if isinstance(schedule, ScaleSchedule):
            sides = tuple(side * patch_size for side in schedule.final_size)
        else:
            sides = (self.height or self.width or DEFAULT_GRID * patch_size,) * 2
        height, width = self.height or sides[0], self.width or sides[1]
        check_pixels("generate", height, width)
        grid = (-(-height // patch_size), -(-width // patch_size))
        if not isinstance(schedule, ScaleSchedule):
            schedule = ScaleSchedule.for_image(grid[0] * patch_size, grid[1] * patch_size, self.steps, patch_size)
        elif grid != schedule.final_size:
            raise ValueError(
                f"generate: height and width must need the schedule's last grid {schedule.final_size}, got {height} x "
                f"{width} px, which need {grid} patches of {patch_size}"
            )
        return Layout(schedule, (height, width))


class SizelessOptions(TypedDict, total=False):
    """The fields of :class:`GenerationSettings` as keyword arguments, where something else says the size."""

    schedule: ScaleSchedule | Iterable[int | Iterable[int]] | None
    steps: int | None
    guidance_scale: float
    guidance_style: GuidanceStyle
    top_k: int
    top_p: float
    published_greedy_quirk: bool
    autocast_dtype: torch.dtype | None


class GenerationOptions(SizelessOptions, total=False):
    """The fields of :class:`GenerationSettings` as keyword arguments."""

    height: int | None
    width: int | None


#: What a model may bring its own defaults for.
MODEL_DEFAULTS = ("guidance_scale", "guidance_style", "top_k", "top_p")


def make_settings(options: GenerationOptions) -> GenerationSettings:
    """The settings that keyword arguments ask for. Raises TypeError for a name that is no setting."""
    _check_names(options, tuple(GenerationOptions.__annotations__), "settings")
    return GenerationSettings(**options)


def check_model_defaults(defaults: Mapping[str, Any]) -> GenerationOptions:
    """The argument, once it holds nothing but valid :data:`MODEL_DEFAULTS`. Raises TypeError and ValueError."""
    _check_names(defaults, MODEL_DEFAULTS, "defaults of a model")
    GenerationSettings(**defaults)
    return GenerationOptions(**defaults)  # type: ignore[typeddict-item]


def _check_names(values: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise TypeError(f"generate: {what} must be among {', '.join(known)}, got {', '.join(unknown)}")


def check_pixels(op: str, height: int, width: int) -> None:
    """Raises ValueError for an image of more than 2**28 pixels."""
    if height * width > _LARGEST_IMAGE:
        raise ValueError(
            f"{op}: height x width must be at most {_LARGEST_IMAGE} pixels, got {height!s:.100} x {width!s:.100}"
        )
