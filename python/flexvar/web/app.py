"""The page: a tab a task, and the gallery of the session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr

from flexvar.web.controls import Sides
from flexvar.web.edits import expand_inputs, inpaint_inputs, outpaint_inputs, refine_inputs
from flexvar.web.studio import Studio
from flexvar.web.task import Inputs, add_task

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
        tasks: list[tuple[str, str, str, Callable[[], Inputs]]] = [
            ("generate", "Generate", "Generate", partial(_generate_inputs, studio)),
            ("inpaint", "In-paint", "Paint anew", inpaint_inputs),
            ("outpaint", "Extend", "Extend", outpaint_inputs),
            ("expand", "Expand", "Expand", expand_inputs),
            ("refine", "Refine", "Refine", refine_inputs),
        ]
        with gr.Tabs():
            for name, title, verb, make_inputs in tasks:
                with gr.Tab(title, id=name):
                    add_task(studio, gallery, name, verb, make_inputs)
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


def _generate_inputs(studio: Studio) -> Inputs:
    height, width = studio.pipe.settings().layout(studio.pipe.patch_size).image_size
    sides = Sides(studio, width, height)
    return {"width": sides.width, "height": sides.height}, lambda _, **sizes: (None, sizes)
