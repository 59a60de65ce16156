"""The tasks that start from a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from flexvar.cli_options import DEFAULT_MAX_SIDE
from flexvar.edit_request import EditRequest
from flexvar.web.painter import make_painter, write_mask
from flexvar.web.picture import PictureInput, copied
from flexvar.web.studio import Shown, Studio
from flexvar.web.task import Inputs, Run, drawing_run, steps_or_auto


def inpaint_inputs(studio: Studio) -> Inputs:
    """A picture with a brush."""
    painter = make_painter()
    picture = PictureInput(painter)
    pasting = _pasting()

    def start(folder: Path, image: str | None, mask: str, max_side: int, **arguments: Any) -> Any:
        path = copied(image, folder, "inpaint")
        mask_path = folder / f"{path.stem}-mask.png"
        write_mask(mask, mask_path)
        return EditRequest("inpaint", path, mask_path, max_side, _arguments(arguments)), {}

    return {"image": picture.file, "mask": painter, **pasting}, drawing_run(studio, start)


def outpaint_inputs(studio: Studio) -> Inputs:
    """A picture and four margins."""
    picture = PictureInput()
    with gr.Row():
        margins = {
            side: gr.Number(0 if side in ("top", "bottom") else 32, label=side.title(), precision=0, min_width=60)
            for side in ("left", "right", "top", "bottom")
        }
    return {"image": picture.file, **margins, **_pasting()}, _run(studio, "outpaint")


def expand_inputs(studio: Studio) -> Inputs:
    """A picture and the size of the whole."""
    picture = PictureInput()
    return {"image": picture.file, **_sides(128, 64), **_pasting()}, _run(studio, "expand")


def refine_inputs(studio: Studio) -> Inputs:
    """A picture and a larger size."""
    picture = PictureInput()
    sides = _sides(128, 128)
    with gr.Accordion("Details", open=False):
        return {"image": picture.file, **sides, **_options()}, _run(studio, "refine")


def reconstruct_inputs(studio: Studio) -> Inputs:
    """A picture, and how many scales to show of it."""
    picture = PictureInput()
    with gr.Row():
        steps = gr.Number(0, label="Steps (0: auto)", precision=0, min_width=100)
        max_side = gr.Number(DEFAULT_MAX_SIDE, label="Shrink larger pictures to", precision=0, min_width=120)

    def run(folder: Path, image: str | None, steps: int, max_side: int) -> Iterator[Shown]:
        return studio.reconstruct(copied(image, folder, "reconstruct"), steps_or_auto(steps), max_side)

    return {"image": picture.file, "steps": steps, "max_side": max_side}, run


def _run(studio: Studio, task: str) -> Run:
    def start(folder: Path, image: str | None, max_side: int, **arguments: Any) -> Any:
        path = copied(image, folder, task)
        return EditRequest(task, path, None, max_side, _arguments(arguments)), {}

    return drawing_run(studio, start)


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    start_step = values["start_step"]
    return {**values, "start_step": None if type(start_step) is int and start_step < 0 else start_step}


def _sides(width: int, height: int) -> dict[str, gr.Number]:
    with gr.Row():
        return {
            "width": gr.Number(width, label="Width", precision=0, min_width=80),
            "height": gr.Number(height, label="Height", precision=0, min_width=80),
        }


def _pasting() -> dict[str, Any]:
    with gr.Accordion("Details", open=False):
        with gr.Row():
            paste = gr.Checkbox(True, label="Keep pixels exactly", min_width=140)
            feather = gr.Number(0, label="Feather (px)", precision=0, min_width=90)
        return {"paste": paste, "feather": feather, **_options()}


def _options() -> dict[str, Any]:
    with gr.Row():
        return {
            "start_step": gr.Number(-1, label="First drawn step (-1: auto)", precision=0, min_width=120),
            "max_side": gr.Number(DEFAULT_MAX_SIDE, label="Shrink larger pictures to", precision=0, min_width=120),
        }
