"""How much one request may ask for: checked before anything large is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from flexvar._numbers import check_integer
from flexvar.cli_options import DrawOptions
from flexvar.schedule import ScaleSchedule, Size


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_pixels: pixels of all images of a request together.
        max_images: images of a request; they are one batch, which is at most the command line's.
        max_steps: steps of a request.
        max_tokens: tokens of all steps of all images of a request together, which memory and time follow.
        max_upload_bytes: of a picture's file.
        max_waiting: requests that may wait for the device; further ones are turned away.
    """

    max_pixels: int = 1 << 20
    max_images: int = 8
    max_steps: int = 64
    max_tokens: int = 1 << 18
    max_upload_bytes: int = 20_000_000
    max_waiting: int = 16

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_steps", "max_tokens", "max_upload_bytes", "max_waiting"):
            check_integer(name.replace("_", "-"), getattr(self, name), 1, op="web")
        check_integer("max-images", self.max_images, 1, DrawOptions.batch, op="web")

    def check_size(self, task: str, size: Size, num: int) -> None:
        """Raises ValueError for ``num`` images of (height, width) that are too many or too large, or no images."""
        check_integer("num", num, 1, self.max_images, op=task)
        height, width = (
            check_integer(name, side, 1, op=task) for name, side in zip(("height", "width"), size, strict=True)
        )
        if num * height * width > self.max_pixels:
            raise ValueError(
                f"{task}: images must have at most {self.max_pixels} pixels together, got {num} of "
                f"{width!s:.100} x {height!s:.100}"
            )

    def check_schedule(self, task: str, schedule: ScaleSchedule, num: int) -> None:
        """Raises ValueError for a schedule of too many steps, or of too many tokens for ``num`` images."""
        check_integer("steps", len(schedule), 1, self.max_steps, op=task)
        if num * schedule.num_tokens > self.max_tokens:
            raise ValueError(
                f"{task}: steps must have at most {self.max_tokens} tokens together, got {num} x {schedule.num_tokens} "
                f"in {len(schedule)} steps"
            )
