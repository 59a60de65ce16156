"""A picture that a task starts from: a file, and how it looks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr

from flexvar.image_io import open_image
from flexvar.web.errors import shown_errors
from flexvar.web.stage import data_url

_SHOWN_SIDE = 768  # pixels


class PictureInput:
    """The component :attr:`file`, and below it what is in the file; or ``painter``, which shows it too."""

    def __init__(self, painter: gr.HTML | None = None) -> None:
        self.file = gr.File(label="Picture", file_types=["image"], height=96, elem_classes="picture-file")
        if painter is None:
            shown, show = gr.HTML(apply_default_css=False, elem_classes="shown"), _as_html
        else:
            painter.render()
            shown, show = painter, _for_painter
        # In the queue, beside the device: what fails outside of it shows no message.
        self.file.change(show, self.file, shown, concurrency_limit=4, show_progress="hidden", api_visibility="private")


def copied(path: str | None, folder: Path, task: str) -> Path:
    """The file of a :class:`PictureInput` under its own name in ``folder``. Raises ValueError where there is none."""
    if not path:
        raise ValueError(f"{task}: picture must be chosen first")
    return Path(shutil.copy(path, folder))


def _as_html(path: str | None) -> Any:
    url, size = _shown(path)
    return (
        f'<figure><img src="{url}" alt="the picture to start from"><figcaption>{size}</figcaption></figure>'
        if url
        else ""
    )


def _for_painter(path: str | None) -> Any:
    return gr.update(value="", picture=_shown(path)[0])


def _shown(path: str | None) -> tuple[str, str]:
    """A picture as a data URL, and its size; empty for none."""
    if not path:
        return "", ""
    with shown_errors():
        picture = open_image(path)
        size = f"{picture.width} × {picture.height} px"
        picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return data_url(picture), size
