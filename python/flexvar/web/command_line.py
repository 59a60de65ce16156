"""The command that makes the same images as a request to the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexvar.cli_options import DEFAULT_MAX_SIDE
from flexvar.drawing import Drawing
from flexvar.edit_request import EditRequest

#: What ``--option`` is called here, and what it is where it is left out.
_OPTIONS = {
    "steps": "steps",
    "guidance_scale": "guidance",
    "guidance_style": "guidance-style",
    "top_k": "top-k",
    "top_p": "top-p",
}
_DEFAULTS: Mapping[str, Any] = {"feather": 0, "left": 0, "right": 0, "top": 0, "bottom": 0, "start_step": None}


def command_line(
    drawing: Drawing, request: EditRequest | None, *, model: str, device: str, backend: str, out: str
) -> str:
    """``flexvar generate …`` or ``flexvar inpaint …`` as one types it into a shell, in the folder of the pictures.

    It draws all images of the request into one file, ``out``.
    """
    words = ["flexvar", drawing.task]
    if request is not None:
        words += [file_argument(path) for path in (request.image, request.mask) if path is not None]
    words += ["none" if label is None else str(label) for label in drawing.labels]
    options: dict[str, Any] = {}
    if request is not None:
        options |= {
            name: value for name, value in request.arguments.items() if name != "paste" and value != _DEFAULTS.get(name)
        }
        if request.max_side != DEFAULT_MAX_SIDE:
            options["max-side"] = request.max_side
    options |= {name: drawing.options[name] for name in ("height", "width") if name in drawing.options}
    if drawing.num != len(drawing.labels):
        options["num"] = drawing.num
    options |= {option: drawing.options[name] for name, option in _OPTIONS.items() if name in drawing.options}
    options["seed"] = drawing.seed
    options |= {"model": model, "device": device}
    if backend != "native":
        options["backend"] = backend
    if drawing.dtype != "float32":
        options["dtype"] = drawing.dtype
    options["out"] = out
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    if request is not None and request.arguments.get("paste") is False:
        words.append("--no-paste")
    return shlex.join(words)


def file_argument(path: Path) -> str:
    """A file of the folder as an argument: a name that begins with a dash would be an option."""
    return f"./{path.name}" if path.name.startswith("-") else path.name
