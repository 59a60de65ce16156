"""What an edit starts from, laid out as its result is."""

from __future__ import annotations

from PIL import Image

from flexvar._numbers import check_integer
from flexvar.edit_request import EditRequest
from flexvar.image_io import open_image
from flexvar.schedule import Size

_MARGIN = (226, 232, 240)


def starting_picture(request: EditRequest) -> Image.Image:
    """The picture of an edit, shrunk as the edit has it. Raises OSError and ValueError."""
    picture = open_image(request.image)
    max_side = check_integer("max_side", request.max_side, 0, op=request.task)
    if max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return picture


def edited_size(request: EditRequest, picture: Image.Image) -> Size:
    """(height, width) in pixels of an edit's result."""
    arguments = request.arguments
    left, right, top, bottom = (
        check_integer(name, arguments.get(name, 0), 0, op=request.task) for name in ("left", "right", "top", "bottom")
    )
    return (
        arguments.get("height", picture.height + top + bottom),
        arguments.get("width", picture.width + left + right),
    )


def before_picture(request: EditRequest, picture: Image.Image) -> Image.Image:
    """The picture where it is in the result, on grey; stretched to all of it where the edit refines."""
    height, width = edited_size(request, picture)
    if request.task == "refine":
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    corner = (request.arguments.get("left", 0), request.arguments.get("top", 0))
    if request.task == "expand":
        corner = ((width - picture.width) // 2, (height - picture.height) // 2)
    canvas = Image.new("RGB", (width, height), _MARGIN)
    canvas.paste(picture, corner)
    return canvas
