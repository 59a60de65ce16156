"""A task of the page: its inputs on the left, what it draws on the right, and the endpoint between them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from flexvar.edit_request import EditRequest
from flexvar.web.controls import Controls, next_seed
from flexvar.web.errors import shown_errors
from flexvar.web.stage import make_stage, stage_html, thumbnail_url
from flexvar.web.studio import Shown, Studio

#: A folder for files, and values by name -> what there is to show after every step.
Run = Callable[..., Iterator[Shown]]

#: A task's own inputs by their names in the endpoint, and what it does with them.
Inputs = tuple[dict[str, Any], Run]

#: A folder for files, and by name the values of a task's own inputs -> the edit, if there is one, and options of a
#: drawing.
Start = Callable[..., tuple[EditRequest | None, dict[str, Any]]]

# On a narrow screen the pictures are below the button.
_LOOK_AT_STAGE = """() => {
  const stage = [...document.querySelectorAll('.stage')].find(e => e.offsetParent);
  if (stage) delete stage.parentElement.dataset.cancelled;
  if (innerWidth < 700 && stage) stage.scrollIntoView({behavior: 'smooth', block: 'center'});
}"""
# On what holds the stage: a step that was on its way already may still take the stage's place.
_MARK_CANCELLED = """() => {
  document.querySelectorAll('.stage.running').forEach(e => e.parentElement.dataset.cancelled = '');
}"""
_LARGEST_GALLERY = 60
_LONGEST_FILM = 24  # thumbnails, which are sent again after every step
SILENT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_QUEUE = "device"  # everything that computes: one at a time


def add_task(
    gallery: gr.Gallery, name: str, verb: str, make_inputs: Callable[[], Inputs], controls_of: Studio | None
) -> dict[str, Any]:
    """Adds a task to the page, and returns its own inputs.

    Args:
        gallery: finished pictures join it.
        name: of the task, and of its endpoint.
        verb: what its button says.
        make_inputs: makes the task's own inputs, and says what it does. The endpoint has them first, then those of
            :class:`Controls`.
        controls_of: what draws, where the task draws.
    """
    with gr.Row(elem_classes="task"):
        with gr.Column(scale=4, min_width=300, elem_classes="panel"):
            own, run = make_inputs()
            controls = None if controls_of is None else Controls(controls_of)
            with gr.Row(elem_classes="buttons"):
                draw = gr.Button(verb, variant="primary", scale=3, min_width=120)
                cancel = gr.Button("Cancel", scale=1, min_width=80)
        with gr.Column(scale=6, min_width=300):
            stage = make_stage()
            files = gr.File(label="Download", file_count="multiple", interactive=False, elem_classes="files")
            command = gr.Textbox(
                label="The same from the command line",
                interactive=False,
                buttons=["copy"],
                lines=3,
                placeholder=" ",  # by which style.css knows that it is empty
                elem_classes="command",
            )
    inputs = own
    pressed = draw.click(None, js=_LOOK_AT_STAGE)
    if controls is not None:
        inputs = {**own, **controls.inputs}
        pressed = draw.click(next_seed, [controls.seed, controls.is_random], controls.seed, **SILENT)
    _take_as_sent(inputs)
    drawn = pressed.then(
        _endpoint(run), inputs_kwargs=inputs, outputs=[files, command, stage],
        api_name=name, concurrency_limit=1, concurrency_id=_QUEUE, show_progress="minimal", show_progress_on=stage,
    )  # fmt: skip
    if controls is not None:
        drawn.success(_join_gallery, [files, controls.num, gallery], gallery, **SILENT)
    cancel.click(None, js=_MARK_CANCELLED, cancels=[drawn])
    return own


def _take_as_sent(inputs: dict[str, Any]) -> None:
    """Leaves values to the checks of what draws: gradio rounds some and fails at others without a message."""
    for component in inputs.values():
        if isinstance(component, gr.Number | gr.Slider | gr.Dropdown):
            component.preprocess = lambda payload: payload


def drawing_run(studio: Studio, start: Start) -> Run:
    """What a task does that draws: ``start`` says what, the controls how."""

    def run(folder: Path, **values: Any) -> Iterator[Shown]:
        common = {name: values.pop(name) for name in Controls.NAMES}
        request, options = start(folder, **values)
        task = "generate" if request is None else request.task
        drawing = studio.drawing(task, **{**common, "steps": steps_or_auto(common["steps"])}, **options)
        yield from studio.draw(drawing, request, folder)

    return run


def steps_or_auto(steps: Any) -> Any:
    """The field for steps as a pipeline takes it: 0 is None. Other values are as they are, to be checked there."""
    return None if type(steps) is int and steps == 0 else steps


def _endpoint(run: Run) -> Callable[..., Iterator[tuple[list[str] | None, str, str]]]:
    def endpoint(**values: Any) -> Iterator[tuple[list[str] | None, str, str]]:
        with shown_errors(), tempfile.TemporaryDirectory() as folder:
            film = []
            for shown in run(Path(folder), **values):
                if _is_in_film(shown.step, shown.num_steps):
                    film.append((shown.grid, thumbnail_url(shown.pictures[0])))
                files = [str(path) for path in shown.files] or None
                yield files, shown.command, stage_html(shown, film)

    return endpoint


def _is_in_film(step: int, num_steps: int) -> bool:
    """Whether a step has a thumbnail: all do, or of many steps evenly chosen ones, the last among them."""
    length = min(num_steps, _LONGEST_FILM)
    return (step + 1) * length // num_steps > step * length // num_steps


def _join_gallery(files: Sequence[str], num: int, pictures: Sequence[tuple[str, str | None]] | None) -> list[Any]:
    """The images come first among the files."""
    return [*files[:num], *(pictures or ())][:_LARGEST_GALLERY]
