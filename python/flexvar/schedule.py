"""The scale schedule: the (height, width) in tokens of every step of a generation."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, overload

Size = tuple[int, int]

# Bounds no image comes near: a mistyped number is refused rather than allocated.
_MAX_SIDE = 1 << 15
_MAX_STEPS = 1 << 12
_MAX_TOKENS = 1 << 22  # of all steps: in half precision the published model's keys and values of so many are 256 GiB

# Sides of the square grids of 256 px images (16 x 16 tokens) by number of steps. 6 to 14 are the paper's;
# 1 to 5 continue them downwards and serve only for_image.
_SIDES_OF_16: dict[int, tuple[int, ...]] = {
    1: (16,),
    2: (1, 16),
    3: (1, 5, 16),
    4: (1, 3, 7, 16),
    5: (1, 2, 5, 9, 16),
    6: (1, 2, 4, 6, 10, 16),
    7: (1, 2, 3, 5, 8, 11, 16),
    8: (1, 2, 3, 4, 6, 10, 13, 16),
    9: (1, 2, 3, 4, 5, 7, 10, 13, 16),
    10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    11: (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16),
    12: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
    13: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16),
    14: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16),
}
_PRESETS: dict[int, dict[int, tuple[int, ...]]] = {
    256: {steps: sides for steps, sides in _SIDES_OF_16.items() if steps >= 6},
    384: {11: (*_SIDES_OF_16[10], 24)},
    512: {12: (*_SIDES_OF_16[10], 23, 32), 15: (*_SIDES_OF_16[13], 23, 32)},
}
# for_image beyond the grid of the table: the factor that the presets of 384 and 512 px grow by at most a step, and the
# shorter side up to which stretching the table is close enough.
_LARGEST_GROWTH = 1.5
_LARGEST_STRETCHED_SIDE = 20
_CODE_VARIANT_8 = (1, 2, 3, 5, 7, 10, 13, 16)  # where the released code differs from the paper


@dataclass(frozen=True, init=False)
class ScaleSchedule:
    """The (h, w) of every step, in tokens. Immutable and hashable.

    Args:
        sizes: one (h, w) pair, or one int for a square, per step. They need be neither square nor increasing.

    Attributes:
        sizes: the (h, w) of every step.
        lengths: tokens of every step, h * w.
        offsets: index of every step's first token in the sequence, and one entry more: the number of all tokens.

    Raises:
        TypeError: ``sizes`` is not iterable, or a side is not an int.
        ValueError: no step or too many, more than 2**22 tokens, a side out of range, or something that is not a pair.

    >>> ScaleSchedule([1, (2, 4), (5, 9)]).sizes
    ((1, 1), (2, 4), (5, 9))
    """

    sizes: tuple[Size, ...]
    lengths: tuple[int, ...] = field(repr=False, compare=False)
    offsets: tuple[int, ...] = field(repr=False, compare=False)

    def __init__(self, sizes: Iterable[int | Iterable[int]]) -> None:
        if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
            raise TypeError(f"ScaleSchedule: sizes must be a list of ints or (h, w) pairs, got {sizes!r:.100}")
        checked = tuple(_as_size(step, size) for step, size in enumerate(sizes))
        if not checked:
            raise ValueError("ScaleSchedule: sizes must hold at least one step, got none")
        if len(checked) > _MAX_STEPS:
            raise ValueError(f"ScaleSchedule: sizes must hold at most {_MAX_STEPS} steps, got {len(checked)}")
        lengths = tuple(height * width for height, width in checked)
        if sum(lengths) > _MAX_TOKENS:
            raise ValueError(
                f"ScaleSchedule: sizes must hold at most {_MAX_TOKENS} tokens, all steps together, got {sum(lengths)}"
            )
        # Plain attributes rather than cached properties, whose lock torch.compile cannot trace.
        for name, value in (
            ("sizes", checked),
            ("lengths", lengths),
            ("offsets", tuple(accumulate(lengths, initial=0))),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def preset(cls, steps: int = 10, image_size: int = 256, *, variant: str = "paper") -> ScaleSchedule:
        """The schedules of the paper (arXiv 2502.20313) and the released code, for patches of 16 px.

        256 px: 6 to 14 steps; 384 px: 11; 512 px: 12 and 15. The paper and the released code differ only at 8 steps:
        ``variant="paper"`` is 1 2 3 4 6 10 13 16 and ``variant="code"`` is 1 2 3 5 7 10 13 16.

        Raises:
            TypeError: ``steps`` or ``image_size`` is not an int.
            ValueError: there is no such preset; the text lists those there are.
        """
        if variant not in ("paper", "code"):
            raise ValueError(f'ScaleSchedule.preset: variant must be "paper" or "code", got {variant!r:.100}')
        for name, value in (("steps", steps), ("image_size", image_size)):
            _as_int(value, f"ScaleSchedule.preset: {name}")
        if image_size not in _PRESETS:
            known = ", ".join(map(str, _PRESETS))
            raise ValueError(f"ScaleSchedule.preset: image_size must be one of {known}, got {image_size!r:.100}")
        if steps not in _PRESETS[image_size]:
            known = ", ".join(map(str, _PRESETS[image_size]))
            raise ValueError(
                f"ScaleSchedule.preset: steps must be one of {known} for image_size {image_size}, got {steps!r:.100}"
            )
        if variant == "code" and (image_size, steps) == (256, 8):
            return cls(_CODE_VARIANT_8)
        return cls(_PRESETS[image_size][steps])

    @classmethod
    def for_image(cls, height: int, width: int, steps: int | None = None, patch_size: int = 16) -> ScaleSchedule:
        """A schedule of ``steps`` steps whose last size is the token grid of a ``height`` x ``width`` px image.

        The sides s_i of the 16 x 16 preset with as many steps are stretched to the image's grid (h, w): step i is
        (h * s_i // 16, w * s_i // 16), at least 1, which is the paper's rule for other aspect ratios. Above 14 steps
        the s_i run evenly from 1 to 16; sizes repeat where the grid has fewer sides than there are steps.

        A grid with both sides beyond 20 is reached as the paper reaches 384 and 512 px: the schedule of the same aspect
        ratio with the shorter side 16, then steps that grow by one factor of at most 1.5 (more where they would be over
        half of ``steps``): 10 steps and 24; 10 steps, 23 and 32. ``steps`` counts them all; left out, it is 10 and as
        many as it takes to grow.

        Raises:
            TypeError: an argument is not an int.
            ValueError: an argument is below 1, or a side of the image is not a multiple of ``patch_size``.
        """
        arguments = {"height": height, "width": width, "steps": 1 if steps is None else steps, "patch_size": patch_size}
        for name, value in arguments.items():
            arguments[name] = _as_int(value, f"ScaleSchedule.for_image: {name}")
            if arguments[name] < 1:
                raise ValueError(f"ScaleSchedule.for_image: {name} must be at least 1, got {value!s:.100}")
        # From here on ints: those of numpy wrap around in products.
        height, width, patch_size = (arguments[name] for name in ("height", "width", "patch_size"))
        steps = None if steps is None else arguments["steps"]
        for name in ("height", "width"):
            if arguments[name] % patch_size:
                raise ValueError(
                    f"ScaleSchedule.for_image: {name} must be a multiple of patch_size = {patch_size}, "
                    f"got {arguments[name]}"
                )
        if steps is not None and steps > _MAX_STEPS:
            raise ValueError(f"ScaleSchedule.for_image: steps must be at most {_MAX_STEPS}, got {steps!s:.100}")
        grid = (height // patch_size, width // patch_size)
        shorter = min(grid)
        if shorter <= _LARGEST_STRETCHED_SIDE:
            return cls(_stretched(grid, 10 if steps is None else steps))
        growth_steps = math.ceil(math.log(shorter / 16) / math.log(_LARGEST_GROWTH) - 1e-9)
        if steps is None:
            steps = 10 + growth_steps
        growth_steps = min(growth_steps, steps // 2)
        if growth_steps == 0:
            return cls([grid])
        sizes = _stretched((grid[0] * 16 // shorter, grid[1] * 16 // shorter), steps - growth_steps)
        for step in range(1, growth_steps + 1):
            factor = (16 / shorter) ** (1 - step / growth_steps)
            sizes.append((round(grid[0] * factor), round(grid[1] * factor)))
        return cls(sizes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps together."""
        return self.offsets[-1]

    @property
    def final_size(self) -> Size:
        """(h, w) of the last step."""
        return self.sizes[-1]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Size]:
        return iter(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Size: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Size, ...]: ...
    def __getitem__(self, index: int | slice) -> Size | tuple[Size, ...]:
        return self.sizes[index]

    def __str__(self) -> str:
        return " ".join(f"{height}x{width}" for height, width in self.sizes)


def _stretched(grid: Size, steps: int) -> list[Size]:
    """The sides of the table, or evenly from 1 to 16, as parts of a grid."""
    # A side is numerator / denominator of the grid's: integers, so that the last step is exact.
    if steps in _SIDES_OF_16:
        numerators, denominator = list(_SIDES_OF_16[steps]), 16
    else:
        numerators, denominator = [(steps - 1) + 15 * step for step in range(steps)], 16 * (steps - 1)
    return [(max(1, grid[0] * n // denominator), max(1, grid[1] * n // denominator)) for n in numerators]


def _as_int(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r:.100}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r:.100}") from None


def _as_size(step: int, size: int | Iterable[int]) -> Size:
    if isinstance(size, Iterable) and not isinstance(size, (str, bytes)):
        sides = tuple(size)
        if len(sides) != 2:
            raise ValueError(f"ScaleSchedule: size of step {step} must be an int or an (h, w) pair, got {size!r:.100}")
        height, width = sides
    else:
        height = width = size  # type: ignore[assignment]
    for side in (height, width):
        if not 1 <= _as_int(side, f"ScaleSchedule: every side of step {step}") <= _MAX_SIDE:
            raise ValueError(
                f"ScaleSchedule: every side of step {step} must be from 1 to {_MAX_SIDE}, got {size!r:.100}"
            )
    return operator.index(height), operator.index(width)
