"""Training's memory on the CPU does not grow with the number of shapes it has met."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import random
from pathlib import Path
from flexvar.cli_train import _bound_product_caches
_bound_product_caches()
import torch

def megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

torch.set_num_threads(1)
rng = random.Random(0)
layer = torch.nn.Linear(128, 512)
for step in range(400):  # as a random schedule does: another number of tokens each time
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(2, rng.randint(16, 600), 128, requires_grad=True)).sum().backward()
    layer.zero_grad()
    if step == 99:
        before = megabytes()
print(megabytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_new_shapes_cost_no_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) <= 60, finished.stdout
