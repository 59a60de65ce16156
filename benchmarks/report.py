"""Runs every benchmark and writes the table: ``python -m benchmarks.report [--require-cuda] [--only vq_lookup …]``.

Prints the ratios and writes JSON and Markdown into benchmarks/results/, with device, commit, date and torch version.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import yardsticks
from flexvar_ext import _host

FOLDER = Path(__file__).parent
NO_CASES = 5  # pytest's exit status where no case was selected
NO_BFLOAT16 = (
    " On this CPU torch multiplies bfloat16 in a loop of scalars, some hundred times slower than float32: rows that "
    "would compare with that are left out."
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--require-cuda", action="store_true", help="fail where there is no usable NVIDIA GPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run bench_NAME.py only")
    jobs = min(8, (os.cpu_count() or 1) // 2) if default_device().type == "cuda" else 0
    parser.add_argument(
        "--compile-jobs", type=int, default=jobs, metavar="N",
        help="first compile the peers of N cases at once, into torch's cache on disk (needs pytest-xdist); 0: each "
        f"before it is measured; default here: {jobs}",
    )  # fmt: skip
    parser.add_argument(
        "-k", default="", dest="selected", metavar="EXPRESSION", help="of their cases those that pytest -k takes"
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON and Markdown files")
    options = parser.parse_args()
    if options.require_cuda:
        import flexvar_ext

        if not (torch.cuda.is_available() and flexvar_ext.HAS_CUDA_KERNELS):
            parser.error("--require-cuda: torch sees no CUDA device, or flexvar_ext was built without its CUDA library")
    names = options.only or sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    missing = [name for name in names if not (FOLDER / f"bench_{name}.py").is_file()]
    if missing:
        parser.error(f"no benchmark named {', '.join(missing)}")

    if options.compile_jobs:
        print(f"compiling the peers, {options.compile_jobs} at once …", flush=True)
        compile_peers(names, options.selected, options.compile_jobs)
    report = {**surroundings(), "yardsticks": yardsticks(default_device()), "cases": [], "failed": []}
    for name in names:
        print(f"bench_{name} …", flush=True)
        cases, succeeded = run_file(name, options.selected)
        report["cases"] += cases
        if not succeeded:
            report["failed"].append(f"bench_{name}.py")
    text = markdown(report)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / base_name(report)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"written: {path}.json, {path.name}.md")
    return 1 if report["failed"] else 0


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def surroundings() -> dict[str, Any]:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    on_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def base_name(about: dict[str, Any]) -> str:
    """Of the files that hold what was measured in these surroundings."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return f"{about['date'][:10]}-{device}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = match[1].strip() if match else platform.machine()
    return f"{name} with {_host.cpu_isa()}"  # a virtual machine's name often says no more than the maker's


def compile_peers(names: Sequence[str], selected: str, jobs: int) -> None:
    """What fails here, for want of memory beside the others, say, is compiled when it is measured."""
    options = ["--compile-only", "-k", selected, "-n", str(jobs), "--maxschedchunk=1", "--tb=line", "-W", "ignore"]
    run_pytest(names, options)


def run_pytest(names: Sequence[str], options: Sequence[str]) -> int:
    """On bench_NAME.py of all names, in one process; returns its exit status."""
    files = [str(FOLDER / f"bench_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PYTHONPATH": f"{FOLDER.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(command, cwd=FOLDER.parent, env=environment, check=False).returncode


def run_file(name: str, selected: str = "") -> tuple[list[dict[str, Any]], bool]:
    """One process a file, so that a crash or an exhausted memory costs only its own rows."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = ["--benchmark-enable", "--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={result}"]
        status = run_pytest([name], [*options, "-k", selected])
        benchmarks = json.loads(result.read_text())["benchmarks"] if result.is_file() else []
    cases = [{"group": one["group"], "case": one["name"], **one["extra_info"]} for one in benchmarks]
    return cases, status in (0, NO_CASES)


def markdown(report: dict[str, Any]) -> str:
    sticks = report["yardsticks"]
    products = ", ".join(f"{_rate(sticks[f'gemm_{name}'], 'FLOP/s')} in {name}" for name in _product_names(sticks))
    lines = [
        f"# {report['device']}",
        "",
        f"commit {report['commit']} · {report['date']} · torch {report['torch']} · Python {report['python']}",
        "",
        f"This machine's own rates: matrix product {products}; copy {_rate(sticks['copy'], 'B/s')}."
        + ("" if "bfloat16" in _product_names(sticks) else NO_BFLOAT16),
        "",
        "A ratio is the other implementation's time over the native one's, the median over rounds that alternate.",
        "",
        "| benchmark | case | native | share of the machine's rate | ratios (target) |",
        "|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        test, _, parameters = case["case"].removesuffix("]").partition("[")
        what = test.removeprefix("test_")
        name = case["group"] if what == case["group"] else f"{case['group']}: {what.replace('_', ' ')}"
        cells = [name, parameters, _duration(case["seconds"]["native"]), _share(case, sticks), _ratios(case)]
        lines.append(f"| {' | '.join(cells)} |")
    if report["failed"]:
        lines += ["", f"Failed: {', '.join(report['failed'])}"]
    return "\n".join(lines) + "\n"


def _product_names(sticks: dict[str, float]) -> list[str]:
    return [name.removeprefix("gemm_") for name in sticks if name.startswith("gemm_")]


def _share(case: dict[str, Any], sticks: dict[str, float]) -> str:
    seconds = case["seconds"]["native"]
    shares = []
    if case["flops"]:
        rate = case["flops"] / seconds
        shares.append(f"{_rate(rate, 'FLOP/s')} = {rate / sticks['gemm_' + case['gemm']]:.0%} of matrix product")
    if case["bytes_moved"]:
        rate = case["bytes_moved"] / seconds
        shares.append(f"{_rate(rate, 'B/s')} = {rate / sticks['copy']:.0%} of copy")
    if case["images"]:
        shares.append(f"{case['images'] / seconds:.3g} images/s")
    if case["working_memory"]:
        shares.append(f"{case['working_memory'] / 1e6:.3g} MB beside its inputs")
    return ", ".join(shares)


def _ratios(case: dict[str, Any]) -> str:
    cells = []
    for name, ratio in case["ratios"].items():
        target = case["targets"].get(name)
        if target is None:
            remark = " (native slower)" if ratio < 1 else ""
        else:
            remark = f" (≥{target:g}{'' if ratio >= target else ', missed'})"
        cells.append(f"{name} {ratio:.2f}×{remark}")
    return " · ".join(cells)


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rate(value: float, unit: str) -> str:
    prefix, scale = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{value / scale:.3g} {prefix}{unit}"


if __name__ == "__main__":
    raise SystemExit(main())
