"""An edit as the command line asks for it and as a PNG records it: its files, by name and SHA-256, and its numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from flexvar.generation import Edit, Expand, Inpaint, Outpaint, Refine
from flexvar.generation.editing import Placement
from flexvar.image_io import open_image, open_mask
from flexvar.photos import read_with_fingerprint, shrink
from flexvar.schedule import Size

TASKS: dict[str, type[Edit]] = {kind.task: kind for kind in (Inpaint, Outpaint, Expand, Refine)}
_FILES = ("image", "mask")  # what a task's class takes as pictures; all else are its arguments
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class EditRequest:
    """What to edit, and how.

    Attributes:
        task: "inpaint", "outpaint", "expand" or "refine".
        image, mask: files; a mask for "inpaint" only.
        max_side: pixels a side to which a larger image is shrunk first; 0 is never.
        arguments: of the task's class, but for the pictures.
        expected: the SHA-256 that "image" and "mask" must have, where they are known from before.
    """

    task: str
    image: Path
    mask: Path | None
    max_side: int
    arguments: Mapping[str, Any]
    expected: Mapping[str, str] = field(default_factory=dict)

    def place(self, image: Size) -> Placement:
        """Where a picture of this size goes in the result. Raises as :meth:`load`."""
        return TASKS[self.task].place(image, self.arguments)

    def load(self) -> tuple[Edit, dict[str, str]]:
        """The edit, and the SHA-256 of "image" and "mask".

        Raises:
            OSError: a file cannot be read.
            ValueError, TypeError: a file is not a picture or not the expected one, or an argument breaks its rule.
        """
        image, fingerprint = read_with_fingerprint(self.image, open_image)
        fingerprints = {"image": fingerprint}
        pictures = [shrink(image, self.image.name, self.max_side, op=self.task)]
        if self.mask is not None:
            mask, fingerprints["mask"] = read_with_fingerprint(self.mask, open_mask)
            pictures.append(mask)
        for name, expected in self.expected.items():
            if fingerprints.get(name) != expected:
                raise ValueError(
                    f"rerun: {getattr(self, name)} must be the {name} that was edited, SHA-256 {expected}, "
                    f"got {fingerprints.get(name)}"
                )
        return TASKS[self.task](*pictures, **self.arguments), fingerprints

    def record(self, fingerprints: Mapping[str, str], folder: Path) -> dict[str, Any]:
        """What a PNG in ``folder`` carries of this: JSON, with the files' names as seen from there."""
        files: dict[str, Any] = {}
        for name, path in (("image", self.image), ("mask", self.mask)):
            if path is not None:
                files[name] = {"file": os.path.relpath(path, folder), "sha256": fingerprints[name]}
        return {"task": self.task, **files, "max_side": self.max_side, **self.arguments}

    @classmethod
    def from_record(cls, record: Any, folder: Path, moved: Mapping[str, Path | None]) -> EditRequest:
        """What :meth:`record` wrote into a PNG that lies in ``folder``; ``moved`` says where files are now instead.

        Raises:
            ValueError: it is no such record, or a file is no longer there.
        """
        if type(record) is not dict or record.get("task") not in TASKS:
            raise ValueError(f"rerun: edit must be one of {', '.join(TASKS)} with its arguments, got {record!r:.200}")
        task = record["task"]
        paths: dict[str, Path | None] = {"image": None, "mask": None}
        expected = {}
        parameters = signature(TASKS[task]).parameters
        files = [name for name in parameters if name in _FILES]
        names = [name for name in parameters if name not in _FILES]
        for name in files:
            entry = record.get(name)
            if type(entry) is not dict or type(entry.get("file")) is not str or not _is_sha256(entry.get("sha256")):
                raise ValueError(f"rerun: {name} must be recorded with its file and SHA-256, got {entry!r:.200}")
            path = moved.get(name) or folder / entry["file"]
            if not _is_file(path):
                raise ValueError(
                    f"rerun: {name} must still be there, got no file {path}; --{name} says where it is now (SHA-256 "
                    f"{entry['sha256']})"
                )
            paths[name], expected[name] = path, entry["sha256"]
        missing = [name for name in ("max_side", *names) if name not in record]
        if missing or type(record["max_side"]) is not int:
            raise ValueError(f"rerun: edit must have max_side and {', '.join(names)}, got {record!r:.200}")
        arguments = {name: record[name] for name in names}
        image = paths["image"]
        if image is None:
            raise ValueError("rerun: edit must have an image, got none")
        return cls(task, image, paths["mask"], record["max_side"], arguments, expected)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or in a folder that may not be read
        return False


def _is_sha256(value: Any) -> bool:
    return type(value) is str and _SHA256.fullmatch(value) is not None
