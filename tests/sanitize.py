"""The ops' CUDA tests under NVIDIA's compute-sanitizer: ``python -m tests.sanitize [--tools memcheck] [--minutes 9]``.

Each tool runs the tests in shares, as many at once as --jobs says: it is the host that takes the time. What each share
wrote stays in --out. The exit status is 0 where every share ran to its end without an error of the tool or of a test.
Tests of CUDA graphs are left to the plain run: without torch's cache of memory a capture cannot allocate.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOUND = 99  # exit status of compute-sanitizer when it found an error
INTERRUPTED, NO_TESTS = 2, 5  # of pytest when the time is up, and of an empty share
OWN_KERNELS = ["--kernel-name", "kernel_substring=flexvar"]
# The tool itself fails within cuDNN's and cuBLAS's kernels, and does not see what bulk copies of theirs write.
WITHOUT_LIBRARIES = ["--ignore-glob=*test_conv3x3.py", "--ignore-glob=*test_linear*.py"]


class Tool(NamedTuple):
    options: Sequence[str]  #: of compute-sanitizer
    tests: Sequence[str] = ()  #: options of pytest


TOOLS = {
    "memcheck": Tool(OWN_KERNELS),
    "racecheck": Tool(OWN_KERNELS, WITHOUT_LIBRARIES),
    "synccheck": Tool(OWN_KERNELS),
    "initcheck": Tool((), WITHOUT_LIBRARIES),  # of all kernels, or it would miss what the others write
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("tests", nargs="*", default=["tests/ops"], help="what pytest is given; default: tests/ops")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["memcheck", "racecheck", "initcheck"])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="shares at once")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take one test of N only")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for each tool; then it begins no test")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sanitize", help="folder of the logs")
    options = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer, a part of the CUDA toolkit, must be on the PATH")
    options.out.mkdir(parents=True, exist_ok=True)
    clean = [
        run(name, options.tests, options.jobs, options.every, options.minutes * 60, options.out)
        for name in options.tools
    ]
    return 0 if all(clean) else 1


def run(name: str, tests: Sequence[str], jobs: int, every: int, seconds: float, out: Path) -> bool:
    """Prints what a tool found in all shares; returns whether each ended without an error."""
    begin = time.monotonic()
    logs = [out / f"{name}-{job}.log" for job in range(1, jobs + 1)]
    # Of N times as many shares the first ones are the tests at equal distances.
    commands = [command(name, tests, f"{job}/{jobs * every}", seconds) for job in range(1, jobs + 1)]
    # Every tensor is an allocation of its own, not a piece of one in torch's cache: an access outside of it is seen.
    environment = {**os.environ, "FLEXVAR_REQUIRE_CUDA": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    processes = []
    for share, log in zip(commands, logs, strict=True):
        with log.open("w") as file:
            processes.append(subprocess.Popen(share, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT))
    statuses = [process.wait() for process in processes]
    passed = sum(int(count) for log in logs for count in re.findall(r"(\d+) passed", log.read_text()))
    print(f"{name}: {passed} tests passed in {time.monotonic() - begin:.0f} s", flush=True)
    unclean = [(status, log) for status, log in zip(statuses, logs, strict=True) if status not in (0, NO_TESTS)]
    for status, log in unclean:
        what = {FOUND: "errors", INTERRUPTED: "time was up"}.get(status, f"exit status {status}")
        summary = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: .*", log.read_text(), re.MULTILINE)
        print(f"  {log}: {what} {' '.join(summary)}", flush=True)
    return passed > 0 and not unclean


def command(name: str, tests: Sequence[str], share: str, seconds: float) -> list[str]:
    tool = TOOLS[name]
    return [
        "compute-sanitizer", "--tool", name, "--error-exitcode", str(FOUND), *tool.options,
        sys.executable, "-m", "pytest", *tests, "-m", "cuda", "-k", "not graph", "-p", "no:cacheprovider",
        "-p", "tests.share", "--share", share, "--seconds", str(seconds), *tool.tests,
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
