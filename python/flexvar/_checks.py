"""Argument checks that the models share. Every message is `op: argument, rule, value got`."""

from __future__ import annotations

import torch
from torch import Tensor

from flexvar.schedule import ScaleSchedule


def describe(value: object) -> str:
    """What a message says about a value of the wrong type: the dtype of a tensor, the type of anything else."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def check_schedule(op: str, schedule: object) -> None:
    """Raise TypeError unless it is a :class:`ScaleSchedule`."""
    if not isinstance(schedule, ScaleSchedule):
        raise TypeError(f"{op}: schedule must be a ScaleSchedule, got {type(schedule).__name__}")


def check_float(op: str, name: str, value: object, weight: Tensor) -> Tensor:
    """Return a tensor that can meet ``weight`` in a product: on its device, and of its dtype unless autocast is on."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating point tensor, got {describe(value)}")
    if value.device != weight.device:
        raise ValueError(f"{op}: {name} must be on the model's device, {weight.device}, got {value.device}")
    if value.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(f"{op}: {name} must have the weights' dtype, {weight.dtype}, got {value.dtype}")
    return value
