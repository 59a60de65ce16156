"""A PNG again, from the settings it carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flexvar._numbers import check_integer
from flexvar.drawing import Drawing
from flexvar.edit_request import TASKS, EditRequest
from flexvar.image_io import make_grid, open_image, read_settings

_COMMANDS = ("generate", *TASKS)


@dataclass(frozen=True)
class Recipe:
    """Everything that a PNG says about how it was drawn.

    Attributes:
        settings: as the PNG holds them.
        drawing: the images of the run that it came from.
        request: the edit, if it is one.
        images: which of them it shows.
        sheet: how they are laid out; None for one image as it is.
    """

    settings: Mapping[str, Any]
    drawing: Drawing
    request: EditRequest | None
    images: Sequence[int]
    sheet: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path, *, image: Path | None = None, mask: Path | None = None) -> Recipe:
        """The recipe of a PNG; ``image`` and ``mask`` say where an edit's files are, if not where they were.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: it is not a PNG of ``flexvar``, or its settings are not whole.
        """
        settings = read_settings(path)
        if settings.get("command") not in _COMMANDS:
            raise ValueError(f"rerun: {path} must be drawn by one of {', '.join(_COMMANDS)}, got another command's")
        for name in ("model", "device", "backend"):
            if type(settings.get(name)) is not str:
                raise ValueError(f"rerun: settings must hold {name}, got {settings.get(name)!r:.100}")
        drawing = Drawing.from_record(settings)
        request = None
        if settings["command"] != "generate":
            request = EditRequest.from_record(settings.get("edit"), path.parent, {"image": image, "mask": mask})
        elif image is not None or mask is not None:
            raise ValueError(f"rerun: --image and --mask must be left out for {path}, which edits no picture")
        ids, sheet = settings.get("image_ids"), settings.get("sheet")
        if type(ids) is not list or not ids or (sheet is None and len(ids) > 1):
            raise ValueError(f"rerun: image_ids must name the images that {path} shows, got {ids!r:.100}")
        if sheet is not None and (type(sheet) is not dict or set(sheet) != {"columns"}):
            raise ValueError(f"rerun: sheet must hold columns, got {sheet!r:.100}")
        if sheet is not None and sheet["columns"] is not None:
            check_integer("columns", sheet["columns"], 1, op="rerun")
        for number in ids:
            check_integer("image_ids", number, 0, drawing.num - 1, op="rerun")
        return cls(settings, drawing, request, ids, sheet)

    def assemble(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """The images as the PNG shows them."""
        return pictures[0] if self.sheet is None else make_grid(pictures, **self.sheet)

    def use_recorded_threads(self) -> None:
        """On a CPU: as many threads as then, because sums are split among them. Changes the whole process."""
        if self.settings["device"] == "cpu":
            torch.set_num_threads(check_integer("threads", self.settings.get("threads"), 1, 4096, op="rerun"))


def count_differing_pixels(path: Path, picture: Image.Image) -> int:
    """How many pixels of a file are not bit for bit those of a picture; all, if their sizes differ."""
    before, now = (np.asarray(image) for image in (open_image(path), picture))
    return int((before != now).any(axis=2).sum()) if before.shape == now.shape else before.shape[0] * before.shape[1]
