"""Fixtures and markers for every test."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` need a GPU: skipped without one, failing instead when FLEXVAR_REQUIRE_CUDA=1."""
    if torch.cuda.is_available() or os.environ.get("FLEXVAR_REQUIRE_CUDA") == "1":
        return
    skip = pytest.mark.skip(reason="no CUDA device (FLEXVAR_REQUIRE_CUDA=1 turns this into a failure)")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


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
