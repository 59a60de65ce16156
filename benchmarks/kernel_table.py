"""Writes docs/kernels.md, what the compilers say of every CUDA kernel: ``python -m benchmarks.kernel_table``.

Compiles every ``csrc/*/cuda.cu`` for every architecture with nvcc (no GPU is needed; minutes on two cores), reads
registers, shared memory and spills, and computes how many warps fit on a multiprocessor. A spill is an error. The
floors beside it are those of :mod:`benchmarks.kernel_floors`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.kernel_floors import floor_table

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one, from the CUDA programming guide's table of compute capabilities. Shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    reserved: int = 1024  # shared memory that the system takes of every block
    registers: int = 65536


MULTIPROCESSORS = {
    "75": Multiprocessor(warps=32, blocks=16, shared=64 << 10, reserved=0),
    "80": Multiprocessor(warps=64, blocks=32, shared=164 << 10),
    "86": Multiprocessor(warps=48, blocks=16, shared=100 << 10),
    "89": Multiprocessor(warps=48, blocks=24, shared=100 << 10),
    "90a": Multiprocessor(warps=64, blocks=32, shared=228 << 10),
    "100a": Multiprocessor(warps=64, blocks=32, shared=228 << 10),
    "120": Multiprocessor(warps=48, blocks=24, shared=100 << 10),
}


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of a kernel on one architecture."""

    name: str
    threads: int
    registers: int
    static_shared: int
    spilled: int  # bytes stored and loaded

    def occupancy(self, arch: str, dynamic_shared: int) -> float:
        """Resident warps as a share of the most a multiprocessor holds; 0 where a block does not fit."""
        sm = MULTIPROCESSORS[arch]
        warps = -(-self.threads // 32)
        registers_of_warp = -(-self.registers * 32 // 256) * 256
        # Registers come from four partitions, each of which holds whole warps.
        by_registers = sm.registers // 4 // registers_of_warp * 4 // warps
        shared = self.static_shared + dynamic_shared + sm.reserved
        blocks = min(sm.blocks, sm.warps // warps, by_registers, sm.shared // max(shared, 1))
        return blocks * warps / sm.warps


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_table", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "kernels.md")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args()
    dynamic_shared = dynamic_shared_bytes()
    sources = sorted(ROOT.glob("csrc/*/cuda.cu"))
    tasks = [(source, arch) for source in sources for arch in MULTIPROCESSORS]
    table: dict[tuple[str, str], dict[str, Kernel]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for (source, arch), kernels in zip(tasks, pool.map(lambda task: compile_kernels(*task), tasks), strict=True):
            print(f"{source.parent.name} sm_{arch}: {len(kernels)} kernels", file=sys.stderr, flush=True)
            for kernel in kernels:
                table.setdefault((source.parent.name, kernel.name), {})[arch] = kernel
    spills = [
        f"{name} on sm_{arch}" for (_, name), row in table.items() for arch, kernel in row.items() if kernel.spilled
    ]
    if spills:
        print("register spills: " + "; ".join(spills), file=sys.stderr)
        return 1
    options.out.write_text(markdown(table, dynamic_shared))
    print(f"written: {options.out}")
    return 0


def dynamic_shared_bytes() -> Callable[[str], int]:
    """Shared memory that a kernel's launcher asks for at run time, by the kernel's name."""
    sys.path.insert(0, str(ROOT / "tests" / "emulated"))
    try:
        _emulated = importlib.import_module("_emulated")
    except ImportError as error:
        raise SystemExit(f"kernel_table needs the module that `make emulated` builds: {error}") from None
    of_attention = _emulated.scale_attention_shared_bytes()

    def shared(name: str) -> int:
        static = ("attention_delta", "attention_grad_q_scale", "attention_combine")
        if name.startswith("attention_") and not name.startswith(static):
            match = re.search(r"<(\w+), (\d+)>", name)
            if match is None:
                raise ValueError(f"kernel_table: {name} has no element type and head dim")
            forward, backward = of_attention[match[1], int(match[2])]
            return int(forward if name.startswith("attention_forward") else backward)
        return 0

    return shared


def compile_kernels(source: Path, arch: str) -> list[Kernel]:
    """Every kernel of a source file: nvcc to PTX, which has the number of threads, then ptxas."""
    includes = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        compiler = ["nvcc", "-std=c++20", "-O3", "-ptx", f"-arch=compute_{arch}", *includes, *defines]
        run([*compiler, "-o", str(ptx), str(source)])
        report = run(["ptxas", "-v", f"-arch=sm_{arch}", "-o", str(Path(folder) / "kernels.cubin"), str(ptx)])
        threads = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx.read_text()))
    kernels = []
    for entry, text in re.findall(r"Compiling entry function '(\w+)'(.*?Used [^\n]*)", report, re.DOTALL):
        spills = re.findall(r"(\d+) bytes spill", text)
        static_shared = re.search(r"(\d+) bytes smem", text)
        kernels.append(
            Kernel(
                readable(entry),
                int(threads[entry]),
                int(re.findall(r"Used (\d+) registers", text)[0]),
                int(static_shared[1]) if static_shared else 0,
                sum(map(int, spills)),
            )
        )
    return kernels


def run(command: list[str]) -> str:
    """Standard error of a command that must succeed: where ptxas reports."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stderr


def readable(entry: str) -> str:
    """``attention_forward_tensor_core<__half, 64>`` of a mangled name."""
    name = subprocess.run(["c++filt", entry], capture_output=True, text=True, check=True).stdout.strip()
    name = name.removeprefix("void ").replace("flexvar::", "").split("(anonymous namespace)::")[-1]
    return re.sub(r"\((?:int|bool)\)", "", name[: _end_of_name(name)])


def _end_of_name(name: str) -> int:
    """Where the list of arguments begins: the first parenthesis outside of <>, casts such as (int)32 being inside."""
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return i
    return len(name)


def markdown(table: dict[tuple[str, str], dict[str, Kernel]], dynamic_shared: Callable[[str], int]) -> str:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    lines = [
        "# CUDA kernels: what the compiler made of them, and how fast they could be",
        "",
        f"Made by `make kernels` with nvcc {release[1] if release else '?'}; nothing here was measured on a GPU.",
        "",
        "## Floors",
        "",
        *floor_table(),
        "",
        "## Registers and occupancy",
        "",
        "Registers of a thread · resident warps as a share of the most that a multiprocessor holds. No kernel spills "
        "a register on any of these architectures: this table is not written, and CI fails, where one does. Shared "
        "memory, in KiB, is the compiler's and the launcher's together.",
        "",
        row("kernel", "threads", "shared", *(f"sm_{arch}" for arch in MULTIPROCESSORS)),
        row("---", *["---:"] * (2 + len(MULTIPROCESSORS))),
    ]
    for (op, name), kernels in sorted(table.items()):
        some = next(iter(kernels.values()))
        dynamic = dynamic_shared(name)
        cells = [cell(kernels.get(arch), arch, dynamic) for arch in MULTIPROCESSORS]
        shared = (some.static_shared + dynamic) / 1024
        lines.append(row(f"{op}: `{name}`", str(some.threads), f"{shared:.1f}", *cells))
    return "\n".join(lines) + "\n"


def cell(kernel: Kernel | None, arch: str, dynamic_shared: int) -> str:
    if kernel is None:
        return "–"
    occupancy = kernel.occupancy(arch, dynamic_shared)
    return f"{kernel.registers} · {occupancy:.0%}" if occupancy else f"{kernel.registers} · –"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
