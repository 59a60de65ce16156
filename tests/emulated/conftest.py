"""Tests that run a CUDA kernel's own source on the CPU: the module ``_emulated``, built by ``make emulated``."""

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

ORDERS = (
    {"order": "forward", "poison": 0xFF},
    {"order": "reversed", "poison": 0x01},
    {"order": "random", "seed": 1, "poison": 0x7F},
    {"order": "random", "seed": 2, "poison": 0xA5},
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/emulated" in item.path.as_posix():
            item.add_marker(pytest.mark.emulated)


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module; without it a skip, or a failure when FLEXVAR_REQUIRE_EMULATED=1."""
    try:
        return importlib.import_module("_emulated")
    except ModuleNotFoundError as error:
        if os.environ.get("FLEXVAR_REQUIRE_EMULATED") == "1":
            raise
        pytest.skip(f"{error}: build it with `make emulated` (FLEXVAR_REQUIRE_EMULATED=1 turns this into a failure)")


Run = Callable[..., tuple]


@pytest.fixture
def run_in_every_order(emulated: ModuleType) -> Run:
    """run(kernel, *arguments, **options): the arrays that the kernel returns, which must be the same bit for bit in
    every order of the threads and whatever memory holds that nobody wrote."""

    def run(kernel: Callable, *arguments: object, **options: object) -> tuple:
        first: tuple | None = None
        for order in ORDERS:
            returned = kernel(*arguments, emulated.Options(**order, **options))
            arrays = returned if isinstance(returned, tuple) else (returned,)
            if first is None:
                first = arrays
            for array, expected in zip(arrays, first, strict=True):
                assert bits(array) == bits(expected), f"the result depends on {order}"
        assert first is not None
        return first

    return run


def bits(array: np.ndarray | Tensor) -> bytes:
    return (array.contiguous().view(-1).view(torch.uint8).numpy() if isinstance(array, Tensor) else array).tobytes()


@pytest.fixture(scope="session")
def launcher(emulated: ModuleType) -> Callable[[str], Run]:
    """launcher(op): the CUDA launcher of torch.ops.flexvar.<op>, called with CPU tensors and, last, emulated.Options.
    Returns a tuple of what it returns, every byte written, and of the arguments that it may write to."""

    def of(op: str) -> Run:
        overload = getattr(torch.ops.flexvar_emulated, op).default
        writes = [a.alias_info is not None and a.alias_info.is_write for a in overload._schema.arguments]

        def launch(*arguments: object) -> tuple[Tensor, ...]:
            *arguments, options = arguments
            with emulated.Device(options):
                placed = [
                    place(emulated, argument, f"argument {i}", options.misalignment, written)
                    if isinstance(argument, Tensor)
                    else argument
                    for i, (argument, written) in enumerate(zip(arguments, writes, strict=True))
                ]
                returned = overload(*placed)
            results = returned if isinstance(returned, tuple) else (returned,)
            for i, result in enumerate(results):
                unwritten = emulated.count_unwritten(result.data_ptr(), result.nbytes)
                assert unwritten == 0, f"{op}: {unwritten} of {result.nbytes} bytes of result {i} were never written"
            changed = [argument for argument, written in zip(placed, writes, strict=True) if written]
            return tuple(tensor.clone() for tensor in (*results, *changed))

        return launch

    return of


@pytest.fixture
def launch_once(emulated: ModuleType, launcher: Callable[[str], Run]) -> Run:
    """launch_once(op, *arguments, **options): the op's launcher in one order of the threads, for what takes long."""
    return lambda op, *arguments, **options: launcher(op)(*arguments, emulated.Options(**options))


@pytest.fixture
def launch_in_every_order(launcher: Callable[[str], Run], run_in_every_order: Run) -> Run:
    """launch_in_every_order(op, *arguments, **options): run_in_every_order of the op's launcher."""
    return lambda op, *arguments, **options: run_in_every_order(launcher(op), *arguments, **options)


def place(emulated: ModuleType, tensor: Tensor, name: str, misalignment: int, writable: bool) -> Tensor:
    """A copy with the same strides in device memory, ``misalignment`` elements behind the buffer's start. Between its
    elements nothing may be touched."""
    strides = [stride if size != 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    buffer = torch.empty(misalignment + extent, dtype=tensor.dtype)
    copy = buffer.as_strided(tensor.shape, tensor.stride(), misalignment)
    once = tuple(slice(None) if stride else slice(1) for stride in strides)  # of what an expansion repeats
    copy[once].copy_(tensor[once])
    emulated.restrict_to(
        buffer.data_ptr(), copy.data_ptr(), name, copy.shape, copy.stride(), copy.element_size(), writable
    )
    return copy
