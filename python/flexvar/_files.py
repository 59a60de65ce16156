"""Writing files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, contents: bytes) -> None:
    """After a crash or an error the file is as it was before or as wanted, never in between.

    Raises:
        OSError: it cannot be written; nothing is left beside it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
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
