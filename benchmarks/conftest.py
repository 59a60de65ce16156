"""The fixtures that every benchmark uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from benchmarks.measure import Clock, Implementation, memory_of, rounds_within, summarize

COMPILED = ("compiled", "FlexAttention")  # the names of what torch.compile makes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile-only", action="store_true", help="call what torch.compile makes once, measure nothing")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device at hand: the GPU where there is one."""
    # Float32 is that of the yardstick's matrix product; by default torch's convolutions round factors to TF32.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compare(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``compare(implementations, check=…)`` measures "native" against every other implementation, alternately.

    implementations: name -> a call without arguments. "native" and "reference" are always among them; "compiled" is
        torch.compile of the reference, anything else a peer under its own name.
    check: ``check(name, result, reference_result)`` raises when that implementation's result is wrong.
    flops, bytes_moved: the work in the result's terms, for the share of the machine's own matrix product and copy rate;
        ``gemm`` names the dtype whose matrix product is the limit.
    images: how many a call makes or takes, for images a second.
    targets: peer -> the ratio that the project aims at; without one, a ratio below 1 is marked.
    seconds: time to spend on the rounds, at least five of them (three where one takes seconds).

    pytest-benchmark times the native call; its rounds run the other implementations in their set-up.
    """
    # Or a second shape would be compiled for all shapes, to much slower code, and other cases' compilations would count
    # against the limit of recompilations.
    torch.compiler.reset()

    def run(
        implementations: Mapping[str, Implementation],
        *,
        check: Callable[[str, Any, Any], None],
        flops: float | None = None,
        gemm: str = "float32",
        bytes_moved: float | None = None,
        images: int | None = None,
        targets: Mapping[str, float] | None = None,
        seconds: float = 2.0,
    ) -> None:
        if request.config.getoption("--compile-only"):  # what is compiled then lies in torch's cache on disk
            for name in COMPILED:
                if name in implementations:
                    implementations[name]()
            return
        # The native call's memory is measured where it computes step by step; what it records holds on to its own.
        working_memory, first = memory_of(implementations["native"], device)
        others = {name: call() for name, call in implementations.items() if name != "native"}  # compiles and warms up
        results = {"native": first, **others}
        for name, result in results.items():
            if name != "reference":
                check(name, result, results["reference"])
        del results, first, others
        if device.type == "cuda":
            for call in implementations.values():
                call()  # CUDA graphs are recorded
        clock = Clock(device)
        # The first round tells how many are wanted.
        times: dict[str, list[float]] = {name: [clock(call)] for name, call in implementations.items()}

        def time_one(name: str) -> None:
            times[name].append(clock(implementations[name]))

        def time_others() -> None:
            for name in implementations:
                if name != "native":
                    time_one(name)

        benchmark.group = request.node.path.stem.removeprefix("bench_")
        rounds = rounds_within(seconds, sum(values[0] for values in times.values()))
        benchmark.pedantic(time_one, setup=lambda: time_others() or (("native",), {}), rounds=rounds - 1)
        benchmark.extra_info.update(
            summarize(times, "native"),
            flops=flops,
            gemm=gemm,
            bytes_moved=bytes_moved,
            images=images,
            working_memory=working_memory,
            targets=dict(targets or {}),
        )

    return run
