"""Argument checks that the ops share. Every message is `op: argument, rule, value got`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(op: str, name: str, value: object, layout: str, dtypes: Sequence[torch.dtype] = FLOATING) -> Tensor:
    """``layout`` such as ``[B, C, H, W]`` gives the rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    rank = layout.count(",") + 1
    if value.dim() != rank:
        raise ValueError(f"{op}: {name} must have shape {layout}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must have dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{op}: {name} must be on a CPU or CUDA device, got {value.device}")
    return value


def check_same_device(op: str, **tensors: Tensor) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listed}")


def check_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_size(op: str, name: str, value: object) -> tuple[int, int]:
    """A (height, width) of positive integers (symbolic ones under torch.compile too)."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{op}: {name} must be (height, width), got {value!r}")
    for side in value:
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must hold integers, got {value!r}")
        if side < 1:
            raise ValueError(f"{op}: {name} must be positive, got {tuple(value)}")
    return value[0], value[1]
