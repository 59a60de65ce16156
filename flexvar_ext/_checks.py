"""Argument checks that the ops share. Every message is `op: argument, rule, value got`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
WITH_FLOAT64 = (*FLOATING, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


def alike(
    tensors: Sequence[object], rank: int, dtypes: Sequence[torch.dtype] = FLOATING, *, beside: Tensor | None = None
) -> bool:
    """Whether all are tensors of this rank and of these dtypes on one supported device, that of ``beside`` if given.

    A quick look, because checking one by one is a good part of a small call's time. Arguments that pass it, and a look
    as quick at their shapes, are right; about others the checks below say what is wrong, if anything is.
    """
    first = tensors[0] if beside is None else beside
    if not isinstance(first, Tensor):
        return False
    on_cpu = first.is_cpu
    if not (on_cpu or first.is_cuda or first.is_meta):
        return False
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dim() != rank or tensor.dtype not in dtypes:
            return False
        if tensor.layout is not torch.strided:
            return False
        if not tensor.is_cpu if on_cpu else tensor.device != first.device:
            return False
    return True


def is_readable(*tensors: Tensor) -> bool:
    """Whether an op's kernel can look at them without a wait: on a CPU, and no fake ones of torch.compile or export.

    Ops of a few microseconds leave the checks to it then, and ask what is wrong when it fails: ``alike`` would be an
    eighth of their time.
    """
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return False
    return not torch.compiler.is_compiling()


def check_tensor(op: str, name: str, value: object, layout: str, dtypes: Sequence[torch.dtype] = FLOATING) -> Tensor:
    """``layout`` such as ``[B, C, H, W]`` gives the rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape {layout}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must have dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout is not torch.strided:
        raise not_dense(op, name, value)
    if not (value.is_cpu or value.is_cuda or value.is_meta):  # device.type is a string made anew, slower than the rest
        raise ValueError(f"{op}: {name} must be on a CPU or CUDA device, got {value.device}")
    return value


def not_dense(op: str, name: str, value: Tensor) -> TypeError:
    """The error for a sparse tensor."""
    layout = str(value.layout).removeprefix("torch.")
    return TypeError(f"{op}: {name} must be a dense tensor, got layout {layout}")


def check_same_device(op: str, **tensors: Tensor) -> None:
    first = None
    for tensor in tensors.values():
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            listed = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise ValueError(f"{op}: all tensors must be on one device, got {listed}")


def check_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def check_bool(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def check_eps(op: str, eps: object) -> None:
    """What is added to a variance."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps <= sys.float_info.max:  # infinity, NaN, or an int that is no float
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")


def check_size(op: str, name: str, value: object) -> tuple[int, int]:
    """A (height, width) of positive integers (symbolic ones under torch.compile too)."""
    # isinstance of an abstract class looks through its registry: the usual classes first.
    if not isinstance(value, (tuple, list)) and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise ValueError(f"{op}: {name} must be (height, width), got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{op}: {name} must be (height, width), got {value!r}")
    for side in value:
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must hold integers, got {value!r}")
        if side < 1:
            raise ValueError(f"{op}: {name} must be positive, got {tuple(value)}")
        if side >= 2**31:
            raise ValueError(f"{op}: {name} must be below 2**31, got {tuple(value)}")
    return value[0], value[1]


def check_elements(op: str, name: str, value: object, elements: int) -> None:
    """A size whose result has so many elements: more than memory holds are refused before their number wraps around."""
    if elements >= 2**48:
        raise ValueError(f"{op}: {name} must make fewer than 2**48 elements, got {value!r}, which makes {elements}")


def check_integer(op: str, name: str, value: object, lowest: int, bound: int) -> None:
    """An int in [lowest, bound)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if not lowest <= value < bound:
        limit = f"2**{bound.bit_length() - 1}" if bound & (bound - 1) == 0 else str(bound)
        raise ValueError(f"{op}: {name} must be in [{lowest}, {limit}), got {value}")


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one carries a forward-mode derivative (``torch.func.jvp``), which torch drops where an op has none."""
    if forward_ad._current_level < 0:  # outside of such derivatives, that is nearly always
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a derivative is recorded for one of them, of either mode."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return has_tangent(*tensors)


def check_no_tangent(op: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError for a forward-mode derivative: it would become 0."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            f"{op}: derivatives must be of reverse mode, got one of forward mode (torch.func.jvp)"
        )


def int64_per_image(
    op: str, name: str, value: int | Sequence[int] | Tensor, batch: int, device: torch.device
) -> Tensor:
    """One unsigned 64-bit number per image as the bits of an int64 tensor [batch]; an int stands for every image.

    A tensor is taken as it is, so that a CUDA one is not waited for: its bits are the numbers.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must have dtype int64, got {str(value.dtype).removeprefix('torch.')}")
        if value.shape != (batch,):
            raise ValueError(f"{op}: {name} must have shape [B] with B = {batch}, got {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{op}: {name} must be on the device of the other tensors, {device}, got {value.device}")
        return value
    if isinstance(value, Sequence):
        if len(value) != batch:
            raise ValueError(f"{op}: {name} must hold one number per image ({batch}), got {len(value)}")
        for number in value:
            check_integer(op, name, number, 0, 2**64)
        return torch.tensor([_signed(number) for number in value], dtype=torch.int64, device=device)
    check_integer(op, name, value, 0, 2**64)
    return torch.full((batch,), _signed(value), dtype=torch.int64, device=device)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
