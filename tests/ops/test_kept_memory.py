"""Large results on the CPU live in blocks that are kept for the next ones (csrc/common/kept_blocks.h)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import flexvar_ext


def doubled(value: float, side: int = 256) -> Tensor:
    """[1, 4, 2 side, 2 side] of one value: 4 MiB for the default."""
    return flexvar_ext.resample2d(torch.full((1, 4, side, side), value), (2 * side, 2 * side), mode="nearest")


def test_results_that_are_in_use_stay():
    view = doubled(0.0).view(-1)[5:9]
    kept = [doubled(float(i), side) for i in range(1, 20) for side in (256, 300, 511)]
    for _ in range(20):
        doubled(-1.0)
    assert view.tolist() == [0.0] * 4
    assert [result.unique().item() for result in kept] == [float(i) for i in range(1, 20) for _ in range(3)]


@pytest.mark.parametrize(("side", "is_kept"), [(22, False), (23, True)])  # 30,976 and 33,856 bytes
def test_results_of_32_kib_are_kept(side, is_kept):
    """Smaller ones are torch's own, which can be resized."""
    assert doubled(0.0, side).untyped_storage().resizable() is not is_kept


def test_threads_do_not_share_blocks():
    wrong: list[float] = []

    def work(value: float) -> None:
        for i in range(50):
            result = doubled(value, 256 + i % 3)
            again = doubled(value + 0.5, 256)
            if result.min() != value or result.max() != value or again.min() != value + 0.5:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def printed_by(program: str) -> str:
    """What a process of its own prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


PROGRAM = """
from pathlib import Path
import torch, flexvar_ext

def megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

x = torch.zeros(1, 4, 1024, 1024)
result = flexvar_ext.resample2d(x, (2048, 2048), mode="nearest")
place = result.data_ptr()
del result
assert flexvar_ext.resample2d(x, (2048, 2048), mode="nearest").data_ptr() == place
before = megabytes()
results = [flexvar_ext.resample2d(x, (2048, 2048), mode="nearest") for _ in range(24)]
assert megabytes() - before > 23 * 60
results.append(flexvar_ext.resample2d(x, (6000, 6000), mode="nearest"))  # 549 MiB: more than is kept at all
del results
print(megabytes() - before)
"""


def test_a_result_takes_the_place_of_one_that_is_gone_and_what_is_kept_is_bounded():
    assert float(printed_by(PROGRAM)) <= 512 + 32


LIMITED = """
import resource
import torch, flexvar_ext

x = torch.zeros(1, 4, 1024, 1024)
results = [flexvar_ext.resample2d(x, (2048, 2048), mode="nearest") for _ in range(7)]
del results  # 448 MiB are kept
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (100 << 20), resource.RLIM_INFINITY))
print(tuple(flexvar_ext.resample2d(x, (4096, 4096), mode="nearest").shape))  # 256 MiB
"""


def test_kept_memory_is_let_go_where_memory_ends():
    assert printed_by(LIMITED) == "(1, 4, 4096, 4096)"


def test_what_does_not_fit_into_memory_is_an_error():
    x = torch.zeros(1).expand(1, 1 << 20, 1, 1)
    with pytest.raises(RuntimeError, match="can't allocate memory for a tensor of"):
        flexvar_ext.resample2d(x, (1 << 13, 1 << 13), mode="nearest")
