"""Times several implementations of one thing alternately in one process: A B C, A B C, …

A slow spell of the machine then meets all of them, and the median of the per-round ratios hardly moves with it. On a
GPU every call starts with a cold L2 cache and is timed by CUDA events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from flexvar.training.precision import multiplies_bfloat16

Implementation = Callable[[], Any]
MIN_ROUNDS, MAX_ROUNDS = 5, 300
LONG_ROUND_SECONDS, LONG_ROUNDS = 4.0, 3  # rounds that take so long are repeated less
FLUSHES = 4  # of the L2 cache before a call on a GPU


# What torch has matrix products in. Where its bfloat16 ones are a loop of scalars, at 1 to 2 GFLOP/s, an image would
# take its implementations ten minutes each, and say nothing.
PRODUCT_DTYPES = [torch.float32]
if torch.cuda.is_available() or multiplies_bfloat16("cpu"):
    PRODUCT_DTYPES.append(torch.bfloat16)


class Clock:
    """``clock(run)``: the seconds that one call takes on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            # The flushes take so long, at least half a millisecond, that the call is queued before they end and launch
            # latency stays out of short kernels: Python takes 0.3 ms for a forward and a backward pass.
            self._flush = torch.empty(max(8 * l2_bytes, 2**29), dtype=torch.uint8, device=device)

    def __call__(self, run: Implementation) -> float:
        if self._device.type == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(FLUSHES):
            self._flush.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self._device)
        return begin.elapsed_time(end) * 1e-3


def memory_of(run: Implementation, device: torch.device) -> tuple[int | None, Any]:
    """The bytes that a call takes on a GPU beyond those in use before it (None on a CPU), and its result."""
    if device.type == "cpu":
        return None, run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, result


def rounds_within(seconds: float, one_round: float) -> int:
    """How many rounds of ``one_round`` seconds to measure."""
    fewest = LONG_ROUNDS if one_round > LONG_ROUND_SECONDS else MIN_ROUNDS
    return max(fewest, min(MAX_ROUNDS, int(seconds / one_round)))


def summarize(times: Mapping[str, list[float]], baseline: str) -> dict[str, Any]:
    """Median seconds of each, and the median over the rounds of each one's time relative to the baseline's."""
    return {
        "rounds": len(times[baseline]),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratios": {
            name: statistics.median(other / own for other, own in zip(values, times[baseline], strict=True))
            for name, values in times.items()
            if name != baseline
        },
    }


def yardsticks(device: torch.device) -> dict[str, float]:
    """What the machine reaches on large work: matrix products in FLOP/s by dtype, copying in bytes moved a second."""
    clock = Clock(device)
    size = 8192 if device.type == "cuda" else 1536
    found = {}
    for dtype in PRODUCT_DTYPES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"gemm_{str(dtype).removeprefix('torch.')}"] = 2 * size**3 / _best(lambda a=a, b=b: a @ b, clock)
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.numel() / _best(lambda: target.copy_(source), clock)
    return found


def _best(run: Implementation, clock: Clock, rounds: int = 8) -> float:
    return min(clock(run) for _ in range(rounds))
