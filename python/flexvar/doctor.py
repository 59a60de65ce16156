"""What was built, what this machine has, and which path every op takes, found out by running each op."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

STRICT_VARIABLE = "FLEXVAR_STRICT"


def is_strict() -> bool:
    """Whether ``FLEXVAR_STRICT`` asks for an error wherever something slower would otherwise stand in."""
    return os.environ.get(STRICT_VARIABLE, "0") not in ("", "0")


@dataclass
class Report:
    """Lines to print; what does not work (``problems``); what works, but slower than it could (``notes``)."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """No problem, and under ``FLEXVAR_STRICT=1`` no note either."""
        return not self.problems and not (is_strict() and self.notes)

    def __str__(self) -> str:
        problems = [f"problem: {text}" for text in self.problems]
        notes = [f"{'problem (strict)' if is_strict() else 'note'}: {text}" for text in self.notes]
        verdict = "all well" if not problems and not notes else None
        return "\n".join([*self.lines, *problems, *notes, *([verdict] if verdict else [])])


def examine() -> Report:
    """Examines this installation. Raises nothing for a broken one: that is what the report says."""
    import torch

    import flexvar

    report = Report()
    report.lines.append(
        f"flexvar {flexvar.__version__} · Python {platform.python_version()} · torch {torch.__version__}"
    )
    try:
        import flexvar_ext
        from flexvar_ext import _host
    except (ImportError, RuntimeError) as error:  # RuntimeError: a library that is older than the Python files
        report.problems.append(f"{error} (build again: pip install --no-build-isolation --no-deps -e .)")
        return report
    info: Mapping[str, Any] = _host.build_info()
    report.lines += _describe_build(info, flexvar_ext.HAS_CUDA_KERNELS, _host.cpu_isa())
    devices = _devices(report, info, flexvar_ext.HAS_CUDA_KERNELS)
    report.lines += list(_op_table(report, devices))
    report.lines.append(_demo_line(report))
    return report


def _describe_build(info: Mapping[str, Any], cuda_loaded: bool, cpu_isa: str) -> list[str]:
    lines = [
        f"CPU library   built with {info['cxx_compiler']} for {info['cpu_instruction_sets']}; this CPU uses {cpu_isa}",
    ]
    if info["cuda"]:
        state = "loaded" if cuda_loaded else "not loaded: this torch is a CPU build"
        lines.append(
            f"CUDA library  built with nvcc {info['cuda_compiler_version']} for {info['cuda_architectures']}; {state}"
        )
    else:
        lines.append("CUDA library  not built: torch was a CPU build, there was no nvcc, or FLEXVAR_CUDA=off was set")
    return lines


def _devices(report: Report, info: Mapping[str, Any], cuda_loaded: bool) -> list[str]:
    """The devices that the ops run on here, described in the report."""
    import torch

    report.lines.append(f"device        cpu, {torch.get_num_threads()} threads")
    devices = ["cpu"]
    driver = _cuda_driver_version()
    if not torch.cuda.is_available():
        if driver is not None:
            reason = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no usable GPU"
            report.notes.append(
                f"an NVIDIA driver (CUDA {driver}) is installed but {reason}: everything runs on the CPU"
            )
        return devices
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        report.lines.append(
            f"device        cuda:{index}, {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, driver CUDA {driver}, torch CUDA {torch.version.cuda}"
        )
        if cuda_loaded:
            devices.append(f"cuda:{index}")
    if not info["cuda"]:
        report.notes.append(
            "there is a GPU but no CUDA kernels: install nvcc and rebuild with FLEXVAR_CUDA=on to generate on the GPU"
        )
    return devices


def _cuda_driver_version() -> str | None:
    """The CUDA version that the installed NVIDIA driver supports, as '13.0', or None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _op_table(report: Report, devices: list[str]) -> Iterator[str]:
    """A line per op: its path on every device, found by running it and comparing with the plain-PyTorch reference."""
    import torch

    from flexvar_ext import _host

    isa = _host.cpu_isa()
    with torch.inference_mode():
        for name, call in _example_calls().items():
            cells = []
            for device in devices:
                kind = f"native ({isa})" if device == "cpu" else "native (CUDA)"
                if not _is_native(name, torch.device(device)):
                    kind = "torch's own"
                error = _compare(name, call, torch.device(device))
                if error is None:
                    cells.append(f"{device}: {kind}")
                else:
                    cells.append(f"{device}: FAILS")
                    report.problems.append(f"{name} on {device}: {error}")
            yield f"op            {name:<28} {' · '.join(cells)}"


def _compare(name: str, call: Callable[[Any, Any], Any], device: Any) -> str | None:
    import torch

    import flexvar_ext

    try:
        native = call(getattr(flexvar_ext, name), device)
        expected = call(getattr(flexvar_ext.reference, name), device)
        torch.testing.assert_close(native, expected, rtol=1e-3, atol=1e-4)
    except Exception as error:  # whatever is wrong with an op is the doctor's to report, not to die of
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _is_native(name: str, device: Any) -> bool:
    """Whether the example call of an op runs in a kernel of flexvar_ext."""
    import torch

    import flexvar_ext

    if name == "conv3x3":
        return flexvar_ext.conv3x3_is_native(torch.empty(0, device=device), resize="up")
    return name != "linear" or device.type == "cpu"


def _example_calls() -> dict[str, Callable[[Any, Any], Any]]:
    """Every op on small seeded inputs: name -> function of (op, device)."""
    import torch

    import flexvar_ext

    def draw(device: Any, *shape: int) -> Any:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)

    def codes(device: Any) -> Any:
        return (torch.arange(2 * 4 * 4) * 7 % 50).view(2, 4, 4).to(device)

    calls: dict[str, Callable[[Any, Any], Any]] = {
        "vq_lookup": lambda op, d: op(draw(d, 40, 8), draw(d, 50, 8)),
        "vq_lookup_multiscale": lambda op, d: op(draw(d, 2, 8, 6, 6), draw(d, 50, 8), [(1, 1), (3, 2), (6, 6)]),
        "resample2d": lambda op, d: op(draw(d, 2, 3, 7, 5), (4, 9), mode="bicubic"),
        "embed_resample": lambda op, d: op(codes(d), draw(d, 50, 8), (6, 7)),
        "scale_attention": lambda op, d: op(*(draw(d, 1, 14, 2, 32) for _ in range(3)), [1, 4, 9]),
        "scale_attention_step": lambda op, d: op(
            draw(d, 1, 9, 2, 32), draw(d, 1, 20, 2, 32), draw(d, 1, 20, 2, 32), 14
        ),
        "append_qkv": lambda op, d: op(
            draw(d, 1, 9, 3, 2, 32), draw(d, 1, 20, 2, 32), draw(d, 1, 20, 2, 32), 5, q_scale=draw(d, 2)
        ),
        "layer_norm_modulate": lambda op, d: op(
            draw(d, 2, 5, 24), draw(d, 2, 1, 24), draw(d, 1, 1, 24).expand(2, 1, 24)
        ),
        "residual_layer_norm_modulate": lambda op, d: op(
            draw(d, 2, 5, 24), draw(d, 2, 6, 24)[:, 1:], *(draw(d, 2, 1, 24) for _ in range(3))
        ),
        "conv3x3": lambda op, d: op(draw(d, 1, 5, 6, 4), draw(d, 7, 5, 3, 3), draw(d, 7), resize="up"),
        "group_norm_silu": lambda op, d: op(draw(d, 2, 12, 5, 4), 3, draw(d, 12), draw(d, 11, 12)[0]),
        "linear": lambda op, d: op(draw(d, 2, 5, 24), draw(d, 9, 24), draw(d, 9), activation="gelu_tanh"),
        "guided_sample": lambda op, d: op(draw(d, 2, 9, 50), top_k=20, top_p=0.9, seed=1, image_ids=[0, 1], step=2),
    }
    return {name: calls[name] for name in flexvar_ext.reference.__all__}


def _demo_line(report: Report) -> str:
    from flexvar.generation.pretrained import DEMO_FOLDER, is_pipeline_folder

    if is_pipeline_folder(DEMO_FOLDER):
        return f"demo model    {DEMO_FOLDER}"
    report.problems.append(f"the bundled demo model is missing from {DEMO_FOLDER}")
    return "demo model    missing"
