"""Checkpoints that survive a crash at any moment, and are refused when damaged.

A run's folder holds ``step-<n>.safetensors`` and ``checkpoint.json``, which names that file and its SHA-256, and
carries a SHA-256 of its own contents. Files are written under another name, flushed to the disk and renamed;
``checkpoint.json`` comes last, so that it always names a complete file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from flexvar._files import remove_parts, write_atomically

INDEX_NAME = "checkpoint.json"


def has_checkpoint(folder: Path) -> bool:
    """Whether a run was saved in this folder."""
    return (folder / INDEX_NAME).exists()


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Saves tensors and JSON values as the folder's checkpoint, then removes the one before.

    Raises:
        OSError: it cannot be written, as on a full disk; the checkpoint before is whole.
    """
    contents = save_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    path = folder / _tensors_name(step)
    write_atomically(path, contents)
    index = {
        "step": step,
        "file": path.name,
        "file_sha256": hashlib.sha256(contents).hexdigest(),
        "values": dict(values),
    }
    index["sha256"] = _digest(index)
    write_atomically(folder / INDEX_NAME, json.dumps(index, indent=1).encode())
    remove_leftovers(folder, step)


def remove_leftovers(folder: Path, step: int) -> None:
    """Removes what a run leaves beside its checkpoint of this step when it is killed in a save: parts, other steps."""
    remove_parts(folder)
    for other in folder.glob("step-*.safetensors"):
        if other.name != _tensors_name(step):
            other.unlink()


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """The folder's checkpoint: step, tensors, values.

    Raises:
        ValueError: there is none, or a file of it is missing, truncated or altered.
    """
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        raise ValueError(f"load_checkpoint: folder must hold {INDEX_NAME}, got {str(folder)!r}")
    try:
        index = json.loads(index_path.read_bytes())
        damaged = index.pop("sha256") != _digest(index)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        damaged = True
    if damaged:
        raise ValueError(f"load_checkpoint: {str(index_path)!r} is damaged: its contents do not have its checksum")
    step, values = index.get("step"), index.get("values")
    if type(step) is not int or type(values) is not dict or index.get("file") != _tensors_name(step):
        raise ValueError(f"load_checkpoint: {str(index_path)!r} must hold step, file and values, got another file's")
    path = folder / _tensors_name(step)
    if not path.is_file():
        raise ValueError(f"load_checkpoint: {str(path)!r}, named by {INDEX_NAME}, is missing")
    contents = path.read_bytes()
    if hashlib.sha256(contents).hexdigest() != index.get("file_sha256"):
        raise ValueError(
            f"load_checkpoint: {str(path)!r} is truncated or damaged: its {len(contents)} bytes do not have the "
            f"checksum in {INDEX_NAME}"
        )
    try:
        return step, load_safetensors(contents), values
    except SafetensorError as error:
        raise ValueError(f"load_checkpoint: {str(path)!r} is not a whole safetensors file: {error}") from error


def _tensors_name(step: int) -> str:
    return f"step-{step:07d}.safetensors"


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
