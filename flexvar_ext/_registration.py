"""What the op files share: autocast, gradients, and gradients that have none themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection
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


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def differentiable(name: str, gradient: Callable[..., Any], save: Callable[..., None]) -> Callable[..., Any]:
    """Registers the gradient of ``flexvar::name``, and returns the op as its Python function is to call it.

    What torch registers takes up to 0.1 ms a call, since it reads the op's schema anew. So where a gradient is recorded
    the function returned does the same in a small torch.autograd.Function, and where none is it goes past autograd. It
    calls what is registered where torch has to see the call: while compiling and within torch.func.

    Args:
        gradient, save: ``backward`` and ``setup_context`` of torch.library.register_autograd.

    Returns: takes the op's arguments, all by position. What autocast casts of them must be cast where a gradient is
    recorded.
    """
    op = getattr(torch.ops.flexvar, name).default
    torch.library.register_autograd(f"flexvar::{name}", gradient, setup_context=save)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            output = op(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    recorded: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*inputs)
        if torch.is_inference_mode_enabled():  # which has no autograd
            return op(*inputs)
        if torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    return recorded.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call


def forbid_second_gradient(name: str) -> None:
    """Makes the gradient of a gradient of ``flexvar::name`` an error: torch would take it for 0, with one warning."""

    def refuse(ctx: Any, *gradients: Tensor | None) -> NoReturn:
        raise NotImplementedError(f"{name}: gradients must be of first order, got the gradient of a gradient")

    torch.library.register_autograd(f"flexvar::{name}_backward", refuse)
