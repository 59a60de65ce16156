"""Checkpoints: complete at every moment of a save, refused when damaged."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flexvar.training import checkpoint
from flexvar.training.checkpoint import INDEX_NAME, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def save(folder, step, size=1000):
    save_checkpoint(folder, step, {"weight": torch.full((size,), float(step))}, {"seed": 7})


def test_round_trip_and_only_the_last_is_kept(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    step, tensors, values = load_checkpoint(tmp_path)
    assert (step, values) == (2, {"seed": 7})
    assert torch.equal(tensors["weight"], torch.full((1000,), 2.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX_NAME, "step-0000002.safetensors"]


def test_missing(tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold checkpoint\.json"):
        load_checkpoint(tmp_path)
    save(tmp_path, 1)
    (tmp_path / "step-0000001.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [INDEX_NAME, "step-0000003.safetensors"])
def test_every_truncation_and_bit_flip_is_refused(tmp_path, name):
    save(tmp_path, 3, size=50)
    path = tmp_path / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        if name != INDEX_NAME:
            with pytest.raises(ValueError, match="damaged"):
                load_checkpoint(tmp_path)
            continue
        # A flip between kinds of white space leaves the index as it was: what is read is right, or nothing is.
        with contextlib.suppress(ValueError):
            step, tensors, values = load_checkpoint(tmp_path)
            assert (step, values, tensors["weight"][0].item()) == (3, {"seed": 7}, 3.0)
    for length in rng.integers(len(whole), size=50):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(tmp_path)
    path.write_bytes(whole)
    assert load_checkpoint(tmp_path)[0] == 3


def test_a_failure_at_any_write_leaves_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(path, contents):
        raise OSError(28, "No space left on device")

    writes = []

    def fail_second(path, contents):
        if writes:
            fail(path, contents)
        writes.append(path)
        real(path, contents)

    real = checkpoint.write_atomically
    for broken in (fail, fail_second):
        monkeypatch.setattr(checkpoint, "write_atomically", broken)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
        assert load_checkpoint(tmp_path)[0] == 1


SAVER = """
import sys, torch
from pathlib import Path
from flexvar.training.checkpoint import save_checkpoint
print("ready", flush=True)
step = 0
while True:
    step += 1
    save_checkpoint(Path(sys.argv[1]), step, {"weight": torch.full((20000,), float(step))}, {})
"""


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while not checkpoint.has_checkpoint(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        rng = np.random.default_rng(0)
        for _ in range(20):  # stopped, a process has as much on the disk as a killed one
            time.sleep(rng.random() * 0.02)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.002)
            step, tensors, _ = load_checkpoint(tmp_path)
            assert tensors["weight"][-1].item() == step
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    step, tensors, _ = load_checkpoint(tmp_path)
    assert tensors["weight"][-1].item() == step
