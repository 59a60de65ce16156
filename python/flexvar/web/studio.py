"""What the page draws: requests checked, drawn step by step, and written as PNGs with their settings."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from flexvar._numbers import check_integer
from flexvar.cli_options import DrawOptions
from flexvar.commands import autocast_dtype, parse_labels, scales_sheet
from flexvar.drawing import Drawing
from flexvar.edit_request import EditRequest
from flexvar.generation import FlexVARPipeline
from flexvar.image_io import open_image, save_png
from flexvar.photos import shrink
from flexvar.schedule import Size
from flexvar.web.before import before_picture, starting_picture
from flexvar.web.command_line import command_line, file_argument
from flexvar.web.limits import Limits


@dataclass(frozen=True)
class Shown:
    """What there is to show after a step.

    Attributes:
        step: from 0.
        num_steps: of the whole schedule.
        grid: (h, w) of this step, in tokens.
        size: (height, width) of the finished images, in pixels.
        pictures: every image of the request as this step has it.
        before: what an edit starts from, laid out as its result is.
        files: after the last step: a PNG of every image, then the pictures that an edit started from.
        command: after the last step: the command that makes the same images.
    """

    step: int
    num_steps: int
    grid: Size
    size: Size
    pictures: Sequence[Image.Image]
    before: Image.Image | None = None
    files: Sequence[Path] = ()
    command: str = ""


class Studio:
    """A pipeline, and how much of it a request may have. Computes one step at a time, whoever asks.

    Args:
        pipe: what draws.
        model: its name for ``--model``.
        limits: of every request.
        dtype: what matrix products are computed in: "float32", "bfloat16" or "float16".
    """

    def __init__(self, pipe: FlexVARPipeline, model: str, limits: Limits, dtype: str = "float32") -> None:
        self.pipe = pipe
        self.model = model
        self.limits = limits
        self.dtype = dtype
        self._device = threading.Lock()

    def drawing(self, task: str, label: str, num: int, seed: int, **options: Any) -> Drawing:
        """What a request asks for; options that are None are the model's. Raises TypeError and ValueError."""
        check_integer("num", num, 1, self.limits.max_images, op=task)
        text = "" if label is None else str(label).strip()
        return Drawing(
            task=task,
            labels=parse_labels([text or "none"], self.pipe.transformer.config.num_classes, self.pipe.class_names),
            num=num,
            batch=DrawOptions.batch,
            seed=seed,
            dtype=self.dtype,
            options={name: value for name, value in options.items() if value is not None},
        )

    def draw(self, drawing: Drawing, request: EditRequest | None, folder: Path) -> Iterator[Shown]:
        """Draws a request and writes its files into ``folder``, where an edit's own files lie.

        Leaving the loop cancels it.

        Raises:
            OSError, TypeError, ValueError: it cannot be drawn; said before anything is.
        """
        edit, fingerprints, before = None, dict[str, str](), None
        if request is not None:
            picture = starting_picture(request)
            place = request.place((picture.height, picture.width))
            self.limits.check_size(drawing.task, place.size, drawing.num)
            edit, fingerprints = request.load()
            before = before_picture(picture, place)
        layout = drawing.layout(self.pipe, edit)
        size = layout.image_size
        self.limits.check_size(drawing.task, size, drawing.num)
        self.limits.check_schedule(drawing.task, layout.schedule, drawing.num)
        drawing.check(self.pipe, edit)
        record = drawing.record(self.model, self.pipe, edit)
        if request is not None:
            record["edit"] = request.record(fingerprints, folder)
        steps = drawing.stream(self.pipe, edit, range(drawing.num))
        while True:
            with self._device:  # not held while what was drawn is shown: a request that is cancelled may never go on
                _, step = next(steps)
                shown = Shown(
                    step.index, step.num_steps, step.size, size, cast("list[Image.Image]", step.preview()), before
                )
            if step.index + 1 == step.num_steps:
                break
            yield shown
        sources = [] if request is None else [path for path in (request.image, request.mask) if path is not None]
        stem = _free_stem(f"flexvar-{drawing.task}-{drawing.seed}", sources)
        files = []
        for image, picture in enumerate(shown.pictures):
            files.append(folder / f"{stem}{'' if drawing.num == 1 else f'-{image}'}.png")
            save_png(picture, files[-1], {**record, **drawing.shown([image])})
        command = command_line(
            drawing, request, model=self.model, device=self.pipe.device.type, backend=record["backend"],
            out=f"{stem}.png",
        )  # fmt: skip
        yield replace(shown, files=[*files, *sources], command=command)

    def reconstruct(self, path: Path, steps: int | None, max_side: int) -> Iterator[Shown]:
        """A picture through the tokenizer and back at every scale; the sheet of all is written beside it.

        Raises:
            OSError, TypeError, ValueError: it cannot be done; said before anything is.
        """
        check_integer("max_side", max_side, 0, op="reconstruct")
        picture = shrink(open_image(path), path.name, max_side, op="reconstruct")
        size = (picture.height, picture.width)
        self.limits.check_size("reconstruct", size, 1)
        layout = self.pipe.settings(height=size[0], width=size[1], steps=steps).layout(self.pipe.patch_size)
        self.limits.check_schedule("reconstruct", layout.schedule, 1)
        with self._device:
            out = self.pipe.reconstruct(picture, steps=steps, autocast_dtype=autocast_dtype(self.dtype))
        scales = []
        for step in out.steps:
            with self._device:
                scales += cast("list[Image.Image]", step.preview())
            shown = Shown(step.index, step.num_steps, step.size, size, scales[-1:], picture)
            if step.index + 1 < step.num_steps:
                yield shown
        target = path.with_name(f"{_free_stem('flexvar-reconstruct', [path])}.png")
        save_png(scales_sheet(picture, out.steps, scales), target)
        words = ["flexvar", "reconstruct", file_argument(path), "--out", target.name, "--max-side", str(max_side)]
        words += ["--model", self.model, "--device", self.pipe.device.type, "--dtype", self.dtype]
        words += ["--backend", self.pipe.transformer.backend] + ([] if steps is None else ["--steps", str(steps)])
        yield replace(shown, files=[target, path], command=shlex.join(words))


def _free_stem(stem: str, sources: Sequence[Path]) -> str:
    """A name for results that is not the beginning of a source's."""
    while any(path.name.startswith(stem) for path in sources):
        stem += "-again"
    return stem
