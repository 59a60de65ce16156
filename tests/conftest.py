"""Fixtures and markers for every test."""

import importlib.util
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


def pytest_configure() -> None:
    """Float32 is float32: on CUDA torch's convolutions would round factors to TF32 by default."""
    torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what is not here are skipped; the variable named in the reason makes them fail instead."""
    missing = {"cuda": "" if torch.cuda.is_available() else "CUDA device", "browser": _missing_for_browser()}
    for marker, what in missing.items():
        variable = f"FLEXVAR_REQUIRE_{marker.upper()}"
        if not what or os.environ.get(variable) == "1":
            continue
        skip = pytest.mark.skip(reason=f"no {what} ({variable}=1 turns this into a failure)")
        for item in items:
            if marker in item.keywords:
                item.add_marker(skip)


def _missing_for_browser() -> str:
    missing = [module for module in ("gradio", "playwright") if importlib.util.find_spec(module) is None]
    return ", ".join(missing + ([] if shutil.which("chromium") else ["chromium"]))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def untouched_global_rng():
    """The library takes explicit seeds: fails when torch's global generator moved during the test."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator was used"


@pytest.fixture(scope="module")
def one_thread():
    """For tiny models, whose threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """Stands for a full disk: in ``with largest_file(size)`` no file of this process grows beyond that many bytes."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
