"""Where pictures appear: the step that was just drawn, the steps before it, and how far the drawing is."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import gradio as gr
from PIL import Image

from flexvar.schedule import Size
from flexvar.web.studio import Shown

_LARGEST_PNG = 1 << 18  # pixels; larger pictures are shown as WebP, and downloaded as the PNG that they are
_THUMBNAIL = 96

_EMPTY = """<div class="stage"><div class="empty"><svg viewBox="-1 -1 70 30" aria-hidden="true">
<rect x="0" y="18" width="10" height="10"/><path d="M16 28v-16h16v16zM24 12v16M16 20h16"/>
<path d="M40 28v-28h28v28zM47 0v28M54 0v28M61 0v28M40 7h28M40 14h28M40 21h28"/></svg>
<p>Every step is the whole image at its own resolution. Watch it grow here.</p></div></div>"""

_JAVASCRIPT = """
element.addEventListener('input', event => {
  if (event.target.matches('.compare input')) {
    event.target.parentElement.style.setProperty('--cut', event.target.value + '%');
  }
});
"""


def make_stage() -> gr.HTML:
    """A component that shows what :func:`stage_html` makes; empty at first."""
    return gr.HTML(_EMPTY, js_on_load=_JAVASCRIPT, apply_default_css=False)


def stage_html(shown: Shown, film: Sequence[tuple[Size, str]]) -> str:
    """The pictures of a step; below, thumbnails of the steps so far.

    Args:
        shown: the step.
        film: of steps so far the grid and, as a data URL, the first picture.
    """
    height, width = shown.size
    is_done = shown.step + 1 == shown.num_steps
    before = data_url(shown.before) if shown.before is not None and is_done else None
    frames = []
    for number, picture in enumerate(shown.pictures):
        url = data_url(picture)
        image = f'<img src="{url}" alt="image {number + 1}">'
        if before is not None:
            image = (
                f'<div class="compare">{image}<img class="before" src="{before}" alt="before">'
                '<input type="range" min="0" max="100" value="50" aria-label="before and after">'
                '<span class="tag left">before</span><span class="tag right">after</span></div>'
            )
        frames.append(f'<figure style="aspect-ratio: {width} / {height}">{image}</figure>')
    columns = 1 if len(frames) == 1 else 2 if len(frames) <= 4 else 4
    rows, cells = shown.grid
    steps = "".join(f'<li><img src="{url}" alt=""><span>{h}×{w}</span></li>' for (h, w), url in film)
    status = (
        f"{width} × {height} px in {shown.num_steps} steps"
        if is_done
        else f"Step {shown.step + 1} of {shown.num_steps} · {rows} × {cells} tokens"
    )
    return (
        f'<div class="stage {"done" if is_done else "running"}" data-step="{shown.step + 1}">'
        f'<div class="pictures" style="--columns: {columns}; --ratio: {width / height:.4f}">{"".join(frames)}</div>'
        f'<div class="progress"><i style="width: {100 * (shown.step + 1) / shown.num_steps:.0f}%"></i></div>'
        f'<p class="status">{escape(status)}</p><ol class="steps">{steps}</ol></div>'
    )


def thumbnail_url(picture: Image.Image) -> str:
    """A small copy as a data URL."""
    small = picture.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return data_url(small)


def data_url(picture: Image.Image) -> str:
    """A picture as a data URL, exact where it is small."""
    encoded = io.BytesIO()
    kind = "png" if picture.width * picture.height <= _LARGEST_PNG else "webp"
    picture.save(encoded, format=kind, **({} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
