"""Argument checks that the models share. Every message is `op: argument, rule, value got`."""

from __future__ import annotations

import torch
from torch import Tensor

from flexvar.schedule import ScaleSchedule


def describe(value: object) -> str:
    """What a message says about a value of the wrong type: the dtype of a tensor, the type of anything else."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def find_device(argument: str, device: object, rule: str = "cpu, cuda or cuda:N") -> torch.device:
    """The CPU, or a GPU that torch finds. Raises TypeError for no device and no name of one, ValueError for others."""
    if not isinstance(device, torch.device | str):
        raise TypeError(f"{argument} must be a torch.device or a str, got {type(device).__name__}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{argument} must be {rule}, got {device!r:.100}") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{argument} must be {rule}, got {str(device)!r:.100}")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"{argument} must be one that torch finds ({count} GPUs here), got {str(device)!r:.100}")
    return found


def check_weights_dtype(op: str, dtype: object) -> None:
    """Raise TypeError unless weights can be of it; None stands for the dtype that they have."""
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(
            f"{op}: dtype must be torch.float32, torch.float16, torch.bfloat16, torch.float64 or None, got "
            f"{dtype!r:.100}"
        )


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
