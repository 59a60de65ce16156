"""The page: a tab a task, and the gallery of the session."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

from flexvar.web.controls import Sides
from flexvar.web.studio import Studio
from flexvar.web.task import Start, add_task

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
        with gr.Tabs(), gr.Tab("Generate", id="generate"):
            _add_generate(studio, gallery)
        gallery.render()
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


def _add_generate(studio: Studio, gallery: gr.Gallery) -> None:
    height, width = studio.pipe.settings().layout(studio.pipe.patch_size).image_size

    def make_inputs() -> tuple[list[gr.components.Component], Start]:
        sides = Sides(studio, width, height)
        return [sides.width, sides.height], lambda _, width, height: (None, {"width": width, "height": height})

    add_task(studio, gallery, "generate", "Generate", make_inputs)
