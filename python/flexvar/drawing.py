"""A run of drawing: what the commands draw, what the PNGs say about it, and how the same is drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image

import flexvar
from flexvar._numbers import check_integer
from flexvar.generation import Edit, FlexVARPipeline, GenerationStep
from flexvar.generation.settings import Layout

#: Fields of GenerationSettings that JSON holds, and a PNG says. With an edit the sizes are the edit's.
_SIZES = ("height", "width")
_SETTINGS = ("schedule", "guidance_scale", "guidance_style", "top_k", "top_p", "published_greedy_quirk")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Drawing:
    """Images 0 to num - 1 of a seed, drawn ``batch`` at a time.

    Rounding may depend on what is in a batch together, so an image is drawn again bit for bit in its own batch only:
    all that makes the batches is here.

    Attributes:
        task: "generate", or the edit's.
        labels: classes, which the images have in turn.
        num: how many images.
        batch: how many at a time.
        seed: image i draws as (seed, i).
        dtype: "float32", "bfloat16" or "float16".
        options: keyword arguments of :class:`~flexvar.generation.GenerationSettings`.
    """

    task: str
    labels: Sequence[int | str | None]
    num: int
    batch: int
    seed: int
    dtype: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_integer("--num", self.num, 1, op=self.task)
        check_integer("--batch", self.batch, 1, op=self.task)
        if not self.labels:
            raise ValueError(f"{self.task}: labels must hold at least one label, got none")
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.task}: dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r:.100}")

    def label(self, image: int) -> int | str | None:
        """The class of an image."""
        return self.labels[image % len(self.labels)]

    def layout(self, pipe: FlexVARPipeline, edit: Edit | None) -> Layout:
        """The steps, and the size of the images."""
        sizes = {} if edit is None else {"height": edit.size[0], "width": edit.size[1]}
        return pipe.settings(**{**self._settings(), **sizes}).layout(pipe.patch_size)

    def check(self, pipe: FlexVARPipeline, edit: Edit | None) -> None:
        """Raises ValueError and TypeError for what cannot be drawn, before anything is computed.

        That is every label, also one that no image has.
        """
        pipe.stream(self.labels, edit=edit, seed=self.seed, **self._settings())

    def num_passes(self, images: Sequence[int]) -> int:
        """How many batches it takes to draw these images."""
        return len({image // self.batch for image in images})

    def stream(
        self, pipe: FlexVARPipeline, edit: Edit | None, images: Sequence[int]
    ) -> Iterator[tuple[range, GenerationStep]]:
        """Every step of the batches that these images are in, with the images of the batch."""
        for start in sorted({image - image % self.batch for image in images}):
            part = range(start, min(start + self.batch, self.num))
            labels = [self.label(image) for image in part]
            for step in pipe.stream(labels, edit=edit, seed=self.seed, image_ids=part, **self._settings()):
                yield part, step

    def draw(
        self, pipe: FlexVARPipeline, edit: Edit | None, images: Sequence[int], on_step: Callable[[], object]
    ) -> Iterator[tuple[int, Image.Image]]:
        """These images, in increasing order, each when its batch is done. ``on_step`` is called after every step."""
        wanted = set(images)
        for part, step in self.stream(pipe, edit, images):
            on_step()
            if step.index + 1 == step.num_steps:
                for image, picture in zip(part, cast("list[Image.Image]", step.preview()), strict=True):
                    if image in wanted:
                        yield image, picture

    def record(self, model: str, pipe: FlexVARPipeline, edit: Edit | None) -> dict[str, Any]:
        """What every PNG of this drawing says: JSON."""
        settings, layout = pipe.settings(**self._settings()), self.layout(pipe, edit)
        return {
            "version": flexvar.__version__,
            "torch": torch.__version__,
            "command": self.task,
            "model": model,
            "device": pipe.device.type,
            "threads": torch.get_num_threads(),
            "backend": pipe.transformer.backend,
            "dtype": self.dtype,
            "labels": list(self.labels),
            "num": self.num,
            "batch": self.batch,
            "seed": self.seed,
            "height": layout.image_size[0],
            "width": layout.image_size[1],
            "schedule": [list(size) for size in layout.schedule],
            "guidance_scale": settings.guidance_scale,
            "guidance_style": settings.guidance_style,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "published_greedy_quirk": settings.published_greedy_quirk,
        }

    def shown(self, images: Sequence[int]) -> dict[str, Any]:
        """What a PNG says of the images it shows."""
        return {"class_labels": [self.label(image) for image in images], "image_ids": list(images)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Drawing:
        """The drawing that a PNG came from. Raises ValueError where it does not say all, TypeError for other types."""
        is_edit = record.get("edit") is not None
        options = (*_SETTINGS, *(() if is_edit else _SIZES))
        needed = ("command", "labels", "num", "batch", "seed", "dtype", *options)
        missing = [name for name in needed if name not in record]
        if missing:
            raise ValueError(f"rerun: settings must hold {', '.join(missing)}, got those of version "
                             f"{record.get('version')!r:.20} without")  # fmt: skip
        if type(record["labels"]) is not list:
            raise TypeError(f"rerun: labels must be a list, got {type(record['labels']).__name__}")
        return cls(
            task=record["command"],
            labels=record["labels"],
            num=record["num"],
            batch=record["batch"],
            seed=record["seed"],
            dtype=record["dtype"],
            options={name: record[name] for name in options},
        )

    def _settings(self) -> dict[str, Any]:
        autocast = {} if self.dtype == "float32" else {"autocast_dtype": getattr(torch, self.dtype)}
        return {**self.options, **autocast}
