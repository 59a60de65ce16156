"""Checkpoints: complete at every moment of a save, refused when damaged."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if name != INDEX_NAME:
            with pytest.raises(ValueError, match="damaged"):
                load_checkpoint(tmp_path)
            continue
        # A flip between kinds of white space leaves the index as it was: what is read is right, or nothing is.
        with contextlib.suppress(ValueError):
            step, tensors, values = load_checkpoint(tmp_path)
            assert (step, values, tensors["weight"][0].item()) == (3, {"seed": 7}, 3.0)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(tmp_path)
    path.write_bytes(whole)
    assert load_checkpoint(tmp_path)[0] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 4}, "must hold step, file and values"),
        ({"step": "3"}, "must hold step, file and values"),
        ({"file": "../elsewhere/step-0000003.safetensors"}, "must hold step, file and values"),
        ({"file": "/step-0000003.safetensors"}, "must hold step, file and values"),
        ({"values": None}, "must hold step, file and values"),
        ({"file_sha256": None}, "truncated or damaged"),
        ({"file_sha256": hashlib.sha256(b"none").hexdigest()}, "not a whole safetensors file"),
    ],
)
def test_an_index_made_to_measure_is_refused(tmp_path, changes, message):
    save(tmp_path, 3)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    del index["sha256"]
    index |= changes
    index["sha256"] = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    if "whole" in message:
        (tmp_path / "step-0000003.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=f"load_checkpoint: .*{message}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("contents", [b"[1]", b"3", b"null", b"[" * 100_000, b'{"sha256": 0}'])
def test_other_json_is_refused(tmp_path, contents):
    (tmp_path / INDEX_NAME).write_bytes(contents)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path)


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


def interrupted_runs(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, str(Path(__file__).with_name("interrupted_runs.py")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_hundred_kills_at_any_moment_change_nothing(tmp_path):
    result = interrupted_runs("kill", tmp_path, 100)
    assert result["problems"] == []
    assert result["killed"] >= 100
    assert result["finished"] >= 4


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    (tmp_path / "whole").mkdir()
    result = interrupted_runs("full", tmp_path / "run")
    assert re.fullmatch(r"\[Errno 27\] File too large: '.*/run/step-0000006\.safetensors'", result["error"])
    assert result["same"]
    assert result["files"] == [INDEX_NAME, "log.jsonl", "step-0000003.safetensors"]
    assert len(result["outcome"]["losses"]) == 12
