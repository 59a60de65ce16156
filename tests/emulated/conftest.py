"""Tests that run a CUDA kernel's own source on the CPU: the module ``_emulated``, built by ``make emulated``."""

import importlib
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

ORDERS = (
    {"order": "forward", "poison": 0xFF},
    {"order": "reversed", "poison": 0x00},
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


Run = Callable[..., tuple[np.ndarray, ...]]


@pytest.fixture
def run_in_every_order(emulated: ModuleType) -> Run:
    """run(kernel, *arguments, **options): the arrays that the kernel returns, which must be the same bit for bit in
    every order of the threads and whatever memory holds that nobody wrote."""

    def run(kernel: Callable, *arguments: object, **options: object) -> tuple[np.ndarray, ...]:
        first: tuple[np.ndarray, ...] | None = None
        for order in ORDERS:
            returned = kernel(*arguments, emulated.Options(**order, **options))
            arrays = returned if isinstance(returned, tuple) else (returned,)
            if first is None:
                first = arrays
            for array, expected in zip(arrays, first, strict=True):
                assert array.tobytes() == expected.tobytes(), f"the result depends on {order}"
        assert first is not None
        return first

    return run
