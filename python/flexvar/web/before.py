"""What an edit starts from, laid out as its result is."""

from __future__ import annotations

from PIL import Image

from flexvar._numbers import check_integer
from flexvar.edit_request import EditRequest
from flexvar.generation.editing import Placement
from flexvar.image_io import open_image

_MARGIN = (226, 232, 240)


def starting_picture(request: EditRequest) -> Image.Image:
    """The picture of an edit, shrunk as the edit has it. Raises OSError and ValueError."""
    picture = open_image(request.image)
    max_side = check_integer("max_side", request.max_side, 0, op=request.task)
    if max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return picture


def before_picture(picture: Image.Image, place: Placement) -> Image.Image:
    """The picture where it is in the result, on grey; stretched to all of it where the edit refines."""
    canvas = Image.new("RGB", place.size[::-1], _MARGIN)
    canvas.paste(picture.resize(place.picture_size[::-1], Image.Resampling.BICUBIC), (place.left, place.top))
    return canvas
