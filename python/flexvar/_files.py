"""Files of a model: written whole or not at all, read with suspicion."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexvar.checkpoint import MissingCheckpointError

_MAX_JSON_BYTES = 1 << 20


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Makes an OSError in the block one of this file: a full disk's says no name, others that of another file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, contents: bytes) -> None:
    """After a crash or an error the file is as it was before or as wanted, never in between.

    Raises:
        OSError: it cannot be written, for want of space or rights; names the file. Nothing is left beside it.
    """
    part = path.with_name(f".{path.name}.{threading.get_native_id()}.part")  # of no other thread or process
    with errors_named(path):
        try:
            with part.open("wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name, too, is on the disk
        finally:
            os.close(folder)


def remove_parts(folder: Path) -> None:
    """Removes what :func:`write_atomically` left in a folder when it was killed; nobody may be writing there now."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a small JSON file holds.

    Raises:
        OSError: it cannot be read, or is not there (MissingCheckpointError, which is a ValueError too).
        ValueError: it is longer than a mebibyte, or not JSON, or JSON of something else.
    """
    if not path.is_file():
        raise MissingCheckpointError(f"{path} must exist, got no such file")
    with path.open("rb") as file:
        content = file.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} must have at most {_MAX_JSON_BYTES} bytes, got more")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}") from error
    if type(values) is not dict:
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values
