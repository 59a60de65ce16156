"""Trains tiny runs in processes of their own that end early: killed at random moments, or out of disk space.

A program, not a module of tests: it forks, which must happen before torch has threads. ``python interrupted_runs.py
kill FOLDER KILLS`` and ``python interrupted_runs.py full FOLDER``; prints what it found as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from flexvar.training.checkpoint import INDEX_NAME, has_checkpoint, load_checkpoint
from flexvar.training.config import TrainingConfig
from flexvar.training.loop import LOG_NAME, train
from torch import nn
from tqdm import tqdm

CONFIG = TrainingConfig(steps=12, batch_size=4, warmup_steps=2, bfloat16=False, checkpoint_every=3, seed=3)
AT_ONCE = 8
WIDTH = 16


class StopError(Exception):
    """Ends a run that is to go on later."""


def run(folder: Path, until: int = CONFIG.steps) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, WIDTH), nn.Dropout(), nn.Linear(WIDTH, 1))

    def compute_losses(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        if step == until:
            raise StopError
        x = torch.from_numpy(rng.standard_normal((CONFIG.batch_size, 8), dtype=np.float32))
        return {"loss": (module(x) - x.sum(1, keepdim=True)).square().mean()}

    train(
        module, compute_losses, CONFIG, folder, description="run", values={}, device=torch.device("cpu"),
        resume=has_checkpoint(folder), progress=False,
    )  # fmt: skip


def start(folder: Path) -> int:
    """The process id of a run that begins or goes on; it exits with 0 when it is through, with 1 at an error."""
    process = os.fork()
    if process == 0:
        status = 1
        # tqdm's own lock is a semaphore that all forks share: who is killed while holding it would stop all the others.
        tqdm.set_lock(threading.RLock())
        try:
            run(folder)
            status = 0
        finally:
            os._exit(status)
    return process


def outcome(folder: Path) -> dict[str, object]:
    """All that a run leaves: losses, the bytes of its last checkpoint, the names of its files."""
    lines = (folder / LOG_NAME).read_text().splitlines()
    index = json.loads((folder / INDEX_NAME).read_text())
    return {
        "losses": [json.loads(line)["loss"] for line in lines],
        "checkpoint": index["file_sha256"],
        "files": sorted(path.name for path in folder.iterdir()),
    }


def kill(root: Path, kills: int) -> dict[str, object]:
    """Runs that are killed, each several times, until there were ``kills``; what differs from a run left alone."""
    run(root / "whole")  # here, so that what torch imports late is there for every fork
    whole = outcome(root / "whole")
    began = time.monotonic()
    _, status = os.waitpid(start(root / "again"), 0)
    seconds = time.monotonic() - began
    random = np.random.default_rng(0)
    killed = finished = 0
    problems = [] if status == 0 else ["a run in a process of its own fails"]
    folders = [root / f"killed-{i}" for i in range(AT_ONCE)]
    while killed < kills and not problems:
        # Some at once, so that writing takes turns of other lengths; stopped anywhere, the start of a run included.
        deadlines = [time.monotonic() + random.uniform(0, 1.5) * seconds for _ in folders]
        processes = [start(folder) for folder in folders]
        for folder, process, deadline in sorted(zip(folders, processes, deadlines, strict=True), key=lambda e: e[2]):
            time.sleep(max(0.0, deadline - time.monotonic()))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.WIFSIGNALED(status):
                killed += 1
                if has_checkpoint(folder):
                    try:
                        load_checkpoint(folder)
                    except ValueError as error:
                        problems.append(str(error))
            elif status != 0:
                problems.append(f"{folder.name} could not be resumed")
            else:
                finished += 1
                if outcome(folder) != whole:
                    problems.append(f"{folder.name} is not as the run that was left alone: {outcome(folder)}, {whole}")
                shutil.rmtree(folder)
    for folder in folders:  # what is left is brought to its end
        _, status = os.waitpid(start(folder), 0)
        finished += 1
        if status != 0 or outcome(folder) != whole:
            problems.append(f"{folder.name} did not end as the run that was left alone")
    return {"killed": killed, "finished": finished, "seconds": seconds, "problems": problems}


def full(folder: Path) -> dict[str, object]:
    """A run that is stopped and then goes on where files can no longer grow as large as its checkpoint."""
    with suppress(StopError):
        run(folder, until=CONFIG.checkpoint_every + 1)
    before = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _checkpoint(folder)}
    size = max((folder / name).stat().st_size for name in before)
    _, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, unlimited))
    try:
        run(folder)
        error = "none"
    except OSError as raised:
        error = str(raised)
    resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    after = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _checkpoint(folder)}
    files = sorted(path.name for path in folder.iterdir())
    run(folder)
    return {"error": error, "same": before == after, "files": files, "outcome": outcome(folder)}


def _checkpoint(folder: Path) -> list[str]:
    return [INDEX_NAME, json.loads((folder / INDEX_NAME).read_text())["file"]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread beside the one that forks
    what, folder, *kills = sys.argv[1:]
    print(json.dumps(kill(Path(folder), int(*kills)) if what == "kill" else full(Path(folder))))
