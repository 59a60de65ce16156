"""Where the time of a generation goes: ``python -m benchmarks.parts [--depth 16] [--batch 1] [--float32] …``.

On a GPU the parts are kernels, and what no kernel accounts for is the gaps between them; on a CPU they are ops, and the
rest is Python. Writes the table into benchmarks/results/ with --out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flexvar import ScaleSchedule
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_generate import SETTINGS, Case, make_pipeline
from benchmarks.report import base_name, default_device, surroundings

# The first pattern that a kernel's or op's name matches.
PARTS = {
    "attention": r"attention|append_qkv|flash|sdpa",
    "AdaLN": r"layer_norm_modulate|norm_sum_parts",
    "GroupNorm and SiLU": r"group_norm",
    "convolutions": r"conv|fprop|cudnn",
    "matrix products": r"linear|gemm|gemv|nvjet|cutlass|xmma|aten::mm|aten::addmm|aten::bmm",
    "sampling": r"guided_sample",
    "codes to tokens": r"embed_resample|aten::embedding|resample2d",
}
OTHERS = "everything else"
REPEATS = 5


def part_of(name: str) -> str:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), OTHERS)


def measure_parts(run: Callable[[], Any], device: torch.device) -> tuple[float, dict[str, float]]:
    """The seconds of a call, the median of some, and the seconds of each part in one more, largest first."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):  # what is compiled, recorded or prepared once
        run()
    seconds = []
    for _ in range(REPEATS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        run()
        wait()
    parts: dict[str, float] = {}
    for event in profiler.events():
        on_device = event.device_type == DeviceType.CUDA
        if on_device == (device.type == "cuda"):
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            part = part_of(event.name)
            parts[part] = parts.get(part, 0.0) + microseconds * 1e-6
    return statistics.median(seconds), dict(sorted(parts.items(), key=lambda item: -item[1]))


def table(title: str, seconds: float, parts: dict[str, float], device: torch.device) -> list[str]:
    rest = "gaps between kernels" if device.type == "cuda" else "Python, and what the profiler does not see"
    parts = {**parts, rest: max(seconds - sum(parts.values()), 0.0)}
    lines = [f"**{title}: {seconds * 1e3:.3g} ms**", "", "| part | ms | share |", "|---|---:|---:|"]
    lines += [f"| {part} | {value * 1e3:.3g} | {value / seconds:.0%} |" for part, value in parts.items()]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[16], help="of the transformer")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images")
    parser.add_argument("--float32", action="store_true", help="not in bfloat16 autocast")
    parser.add_argument("--out", type=Path, help="folder of the Markdown file")
    options = parser.parse_args()
    device, about = default_device(), surroundings()
    lines = [
        f"# {about['device']}: where the time goes",
        "",
        f"commit {about['commit']} · {about['date']} · torch {about['torch']} · Python {about['python']}",
        "",
    ]
    for depth in options.depth:
        pipeline = make_pipeline("native", device, depth)
        for batch in options.batch:
            lines += tables_of(pipeline, Case(depth, None if options.float32 else torch.bfloat16, batch), device)
    print("\n".join(lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{base_name(about)}-parts.md"
        path.write_text("\n".join(lines))
        print(f"written: {path}")


def tables_of(pipeline: Any, case: Case, device: torch.device) -> list[str]:
    schedule = ScaleSchedule.preset(case.steps, case.pixels)
    labels = torch.arange(7, 7 + case.batch, device=device)

    def generate() -> Any:
        settings = {"schedule": schedule, "autocast_dtype": case.dtype, "output_type": "latent", **SETTINGS}
        return pipeline(labels, seed=1, **settings)

    last = generate().steps[-1]

    def decode() -> torch.Tensor:
        images: torch.Tensor = last.preview("pt")
        return images

    lines = table(f"{case}: codes of all steps", *measure_parts(generate, device), device)
    lines += table(f"{case}: decoder", *measure_parts(decode, device), device)
    pipeline.cuda_graphs.clear()
    return lines


if __name__ == "__main__":
    main()
