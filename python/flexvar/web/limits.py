"""How much one request may ask for: checked before anything large is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from flexvar.edit_request import EditRequest
from flexvar.generation.settings import check_integer
from flexvar.image_io import open_image
from flexvar.schedule import Size


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_pixels: pixels of all images of a request together.
        max_images: images of a request.
        max_upload_bytes: of a picture's file.
        max_waiting: requests that may wait for the device; further ones are turned away.
    """

    max_pixels: int = 1 << 20
    max_images: int = 8  # at most DrawOptions.batch: all are drawn together
    max_upload_bytes: int = 20_000_000
    max_waiting: int = 16

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_images", "max_upload_bytes", "max_waiting"):
            check_integer(name.replace("_", "-"), getattr(self, name), 1, op="web")

    def check_size(self, task: str, size: Size, num: int) -> None:
        """Raises ValueError for ``num`` images of (height, width) that are too many or too large, or no images."""
        check_integer("num", num, 1, self.max_images, op=task)
        height, width = (
            check_integer(name, side, 1, op=task) for name, side in zip(("height", "width"), size, strict=True)
        )
        if num * height * width > self.max_pixels:
            raise ValueError(
                f"{task}: images must have at most {self.max_pixels} pixels together, got {num} of {width} x {height}"
            )

    def check_edit(self, request: EditRequest, num: int) -> None:
        """As :meth:`check_size` for the result of an edit. Also raises OSError and ValueError for its picture."""
        self.check_size(request.task, edited_size(request), num)


def edited_size(request: EditRequest) -> Size:
    """(height, width) in pixels of an edit's result."""
    width, height = open_image(request.image).size
    max_side = check_integer("max_side", request.max_side, 0, op=request.task)
    if 0 < max_side < max(width, height):
        scale = max_side / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
    arguments = request.arguments
    if "left" in arguments:
        left, right, top, bottom = (
            check_integer(name, arguments[name], 0, op=request.task) for name in ("left", "right", "top", "bottom")
        )
        return height + top + bottom, width + left + right
    return arguments.get("height", height), arguments.get("width", width)
