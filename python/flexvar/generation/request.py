"""What to draw, image by image: labels and seeds, checked before anything is computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexvar._numbers import check_integer
from flexvar.generation.editing import Edit

Label = int | str | None
Labels = Label | Sequence[Label] | Tensor
Seeds = int | Sequence[int] | Tensor

_MAX_SEED = (1 << 63) - 1
_INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def resolve_labels(class_labels: Labels, num_classes: int, class_names: Sequence[str]) -> Tensor:
    """Labels by number, by name (whatever the case), or None for no class -> int64 [B]; no class is ``num_classes``.

    Raises:
        TypeError: something that is neither.
        ValueError: no label, an unknown name or a number out of range.
    """
    if isinstance(class_labels, Tensor):
        if class_labels.dtype not in _INTEGER_TYPES:
            raise TypeError(f"generate: class_labels must be integers, got a tensor of {class_labels.dtype}")
        if class_labels.ndim > 1:
            raise ValueError(f"generate: class_labels must have shape [B], got {tuple(class_labels.shape)}")
        class_labels = class_labels.reshape(-1).tolist()
    if class_labels is None or isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
        class_labels = [class_labels]
    labels = [_resolve_label(label, num_classes, class_names) for label in class_labels]
    if not labels:
        raise ValueError("generate: class_labels must hold at least one label, got none")
    return torch.tensor(labels, dtype=torch.int64)


def _resolve_label(label: Any, num_classes: int, class_names: Sequence[str]) -> int:
    if label is None:
        return num_classes
    if not isinstance(label, str):
        return check_integer("class_labels", label, 0, num_classes, op="generate")
    if not class_names:
        raise ValueError(
            f"generate: class_labels must be numbers, as this model has no class names, got {label!r:.100}"
        )
    folded = [name.casefold() for name in class_names]
    if label.casefold() in folded:
        return folded.index(label.casefold())
    close = difflib.get_close_matches(label.casefold(), folded, n=3)
    meant = [class_names[folded.index(name)] for name in close] or list(class_names[:12])
    hint = ("did you mean " if close else "for example ") + ", ".join(meant)
    raise ValueError(f"generate: class_labels must be names that the model knows, got {label!r:.100}; {hint}")


def match_batch(labels: Tensor, edit: Edit) -> Tensor:
    """Labels int64 [B] for the pictures of an edit: one label for all of them, one picture for all labels, or as many.

    Raises:
        ValueError: neither is one and the numbers differ.
    """
    if len(labels) == 1:
        return labels.expand(edit.count)
    if edit.count not in (1, len(labels)):
        raise ValueError(f"{edit.task}: class_labels must be one, or one per picture ({edit.count}), got {len(labels)}")
    return labels


def resolve_seeds(seed: Seeds, image_ids: Sequence[int] | Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """Seeds and image ids, int64 [B] each.

    One seed for all: image i draws as (seed, i). One seed per image: image i draws as (its seed, 0), so that it does
    not matter where in a batch it is, and equals the only image of a call with that one seed. ``image_ids`` stands in
    for i and 0.

    Raises:
        TypeError: not integers.
        ValueError: not as many as images, or not from 0 to 2**63 - 1.
    """
    if isinstance(seed, list | tuple | range) or (isinstance(seed, Tensor) and seed.ndim > 0):
        seeds, ids = _integers("seed", seed, batch), [0] * batch
    else:
        seeds, ids = [check_integer("seed", seed, 0, _MAX_SEED, op="generate")] * batch, list(range(batch))
    if image_ids is not None:
        ids = _integers("image_ids", image_ids, batch)
    return torch.tensor(seeds, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64)


def _integers(name: str, values: Sequence[int] | Tensor, count: int) -> list[int]:
    listed = values.flatten().tolist() if isinstance(values, Tensor) else values
    if not isinstance(listed, list | tuple | range):
        raise TypeError(f"generate: {name} must be a list of ints, one per image, got {type(values).__name__}")
    if len(listed) != count:
        raise ValueError(f"generate: {name} must be one per image ({count}), got {len(listed)}")
    return [check_integer(name, value, 0, _MAX_SEED, op="generate") for value in listed]
