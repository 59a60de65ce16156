"""The page: a tab a task, and the gallery of the session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from flexvar.web.controls import Sides
from flexvar.web.edits import expand_inputs, inpaint_inputs, outpaint_inputs, reconstruct_inputs, refine_inputs
from flexvar.web.studio import Studio
from flexvar.web.task import SILENT, Inputs, add_task, drawing_run

_KEPT_FOR = 24 * 3600  # seconds that uploads and results stay on the server


def build_app(studio: Studio) -> gr.Blocks:
    """The page of a model, ready to be launched by :func:`flexvar.web.server.serve`."""
    with gr.Blocks(title="FlexVAR", analytics_enabled=False, delete_cache=(3600, _KEPT_FOR)) as app:
        gr.HTML(_header(studio), apply_default_css=False)
        gallery = gr.Gallery(
            label="Pictures of this session",
            columns=8,
            fit_columns=False,
            preview=False,
            object_fit="contain",
            format="png",
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id="gallery",
            render=False,
        )
        pictures = {}
        with gr.Tabs() as tabs:
            for name, title, verb, make_inputs in _TASKS:
                with gr.Tab(title, id=name):
                    draws = studio if name != "reconstruct" else None
                    own = add_task(gallery, name, verb, partial(make_inputs, studio), draws)
                if "image" in own:
                    pictures[title] = (name, own["image"])
        _add_gallery(gallery, tabs, pictures)
    app.queue(max_size=studio.limits.max_waiting, api_open=False)
    return app


def _header(studio: Studio) -> str:
    model = (
        f"{Path(studio.model).name} · {studio.pipe.transformer.config.num_classes} classes · {studio.pipe.device.type}"
    )
    return (
        "<header><h1>FlexVAR</h1><p>Images of any size, in any number of steps.</p>"
        f'<p class="model">{escape(model)}</p></header>'
    )


def _add_gallery(gallery: gr.Gallery, tabs: gr.Tabs, pictures: dict[str, tuple[str, gr.File]]) -> None:
    """The gallery, and buttons that take the picture chosen there (at first the newest) to the tabs that edit."""
    chosen = gr.State(0)
    with gr.Column(elem_id="session"):
        gallery.render()
        with gr.Row(elem_classes="take"):
            for title, (name, file) in pictures.items():
                button = gr.Button(f"{title} it", size="sm", min_width=90)
                button.click(partial(_take, name), [gallery, chosen], [file, tabs], **SILENT)
    gallery.select(_chosen, None, chosen, **SILENT)
    gallery.change(lambda: 0, None, chosen, **SILENT)


def _chosen(event: gr.SelectData) -> int:
    return int(event.index)


def _take(name: str, pictures: list[tuple[str, str | None]] | None, chosen: int) -> tuple[Any, Any]:
    path = pictures[min(chosen, len(pictures) - 1)][0] if pictures else None
    return path, gr.Tabs(selected=name)


def _generate_inputs(studio: Studio) -> Inputs:
    height, width = studio.pipe.settings().layout(studio.pipe.patch_size).image_size
    sides = Sides(studio, width, height)
    run = drawing_run(studio, lambda _, **sizes: (None, sizes))
    return {"width": sides.width, "height": sides.height}, run


#: Name, title, what the button says, and what makes the inputs.
_TASKS: list[tuple[str, str, str, Callable[[Studio], Inputs]]] = [
    ("generate", "Generate", "Generate", _generate_inputs),
    ("inpaint", "In-paint", "Paint anew", inpaint_inputs),
    ("outpaint", "Extend", "Extend", outpaint_inputs),
    ("expand", "Expand", "Expand", expand_inputs),
    ("refine", "Refine", "Refine", refine_inputs),
    ("reconstruct", "Reconstruct", "Reconstruct", reconstruct_inputs),
]
