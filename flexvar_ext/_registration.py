"""What the op files share: autocast, calls that need no gradient, and gradients that have none themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

_library = torch.library.Library("flexvar", "FRAGMENT")


def register_autocast(name: str, *, to: torch.dtype | None = None, only: Collection[str] | None = None) -> None:
    """Under torch.autocast, casts the floating tensor arguments of ``flexvar::name`` to ``to``, or to autocast's dtype.

    ``only`` names the arguments to cast; all of them unless given.

    torch.library.register_autocast fixes the dtype at registration and so cannot follow ``torch.autocast(dtype=…)``.
    """
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _autocast_kernel(name, device, key, to, only), key)


def _autocast_kernel(
    name: str, device: str, key: str, to: torch.dtype | None, only: Collection[str] | None
) -> Callable[..., Any]:
    packet = getattr(torch.ops.flexvar, name)
    names = [argument.name for argument in packet.default._schema.arguments]
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = to or torch.get_autocast_dtype(device)

        def cast(argument: str, value: Any) -> Any:
            eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if eligible and (only is None or argument in only) else value

        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return packet(*map(cast, names, args), **{key: cast(key, value) for key, value in kwargs.items()})

    return kernel


_NOTHING: AbstractContextManager[None] = nullcontext()


def without_gradient(*tensors: Tensor | None) -> AbstractContextManager[None]:
    """Where no gradient of ``tensors``, an op's arguments, is recorded: the op is called past autograd within this.

    What torch.library.register_autograd registers is Python, which costs as much as the rest of a small call. Nothing
    is skipped where torch has to see the call: while compiling and within torch.func.
    """
    if torch.compiler.is_compiling():
        return _NOTHING
    if torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active():  # the first has no autograd
        return _NOTHING
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return _NOTHING
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


def forbid_second_gradient(name: str) -> None:
    """Makes the gradient of a gradient of ``flexvar::name`` an error: torch would take it for 0, with one warning."""

    def refuse(ctx: Any, *gradients: Tensor | None) -> NoReturn:
        raise NotImplementedError(f"{name}: gradients must be of first order, got the gradient of a gradient")

    torch.library.register_autograd(f"flexvar::{name}_backward", refuse)
