"""A picture in the page, and a brush that paints a mask on it."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path

import gradio as gr

_PREFIX = "data:image/png;base64,"
_LARGEST_MASK = 4_000_000  # characters
_TEMPLATE = """<div class="painter">
<div class="canvas"><img class="picture" alt="the picture to paint on">
<canvas role="img" aria-label="paint the mask here"></canvas></div>
<div class="tools">
<label>Brush <input class="size" type="range" min="2" max="40" value="12" aria-label="Brush size"></label>
<label><input class="erase" type="checkbox"> Erase</label>
<button type="button" class="undo" disabled>Undo</button>
<button type="button" class="clear" disabled>Clear</button>
<label class="button">Load mask<input class="mask" type="file" accept="image/*" aria-label="Mask file"></label>
</div><p class="problem" role="alert"></p></div>"""


def make_painter() -> gr.HTML:
    """A component whose value is a mask as a PNG data URL, ``""`` while nothing is painted.

    ``gr.update(picture=...)`` gives it a picture, as a data URL.
    """
    script = resources.files(__package__).joinpath("painter.js").read_text("utf-8")
    return gr.HTML(
        "", label="mask", html_template=_TEMPLATE, js_on_load=script, apply_default_css=False, picture="", render=False
    )  # fmt: skip


def write_mask(value: str | None, path: Path) -> None:
    """Writes the painter's value into a file.

    Raises:
        TypeError: it is no text.
        ValueError: nothing was painted, or it is no PNG.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"inpaint: mask must be text, got {type(value).__name__}")
    if not value:
        raise ValueError("inpaint: mask must be painted first: draw with the brush where to paint anew")
    if not value.startswith(_PREFIX) or len(value) > _LARGEST_MASK:
        raise ValueError(f"inpaint: mask must start with {_PREFIX} and be at most {_LARGEST_MASK} characters long")
    try:
        path.write_bytes(base64.b64decode(value[len(_PREFIX) :], validate=True))
    except ValueError as error:  # binascii.Error, or of other letters than ASCII's
        raise ValueError(f"inpaint: mask must be base64 after {_PREFIX}, got: {error}") from None
