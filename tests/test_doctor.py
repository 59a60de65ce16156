"""What ``flexvar doctor`` says, and where FLEXVAR_STRICT turns a stand-in into an error."""

from __future__ import annotations

import sys

import pytest
import torch
from flexvar import doctor
from flexvar.commands import choose_device
from flexvar.doctor import STRICT_VARIABLE, Report, examine

import flexvar_ext
from flexvar_ext import _host


def test_says_what_was_built_and_runs_every_op() -> None:
    report = examine()
    text = str(report)
    assert f"torch {torch.__version__}" in text
    assert f"this CPU uses {_host.cpu_isa()}" in text
    assert f"device        cpu, {torch.get_num_threads()} threads" in text
    for name in flexvar_ext.reference.__all__:
        is_torchs = name == "conv3x3" and _host.cpu_isa() == "baseline"
        path = "torch's own" if is_torchs else f"native ({_host.cpu_isa()})"
        assert f"{name:<28} cpu: {path}" in text


def test_an_op_that_is_wrong_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        flexvar_ext, "vq_lookup", lambda latents, codebook: torch.zeros(len(latents), dtype=torch.int64)
    )
    report = examine()
    assert f"{'vq_lookup':<28} cpu: FAILS" in str(report)
    assert any(problem.startswith("vq_lookup on cpu: Tensor-likes are not") for problem in report.problems)
    assert not report.healthy


def test_a_broken_installation_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flexvar_ext", None)
    report = examine()
    (problem,) = report.problems
    assert "build again" in problem
    assert f"torch {torch.__version__}" in str(report)


def test_strict_turns_notes_into_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(notes=["no kernels for the GPU"])
    monkeypatch.delenv(STRICT_VARIABLE, raising=False)
    assert report.healthy
    assert str(report) == "note: no kernels for the GPU"
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    assert not report.healthy
    assert str(report) == "problem (strict): no kernels for the GPU"
    assert str(Report()) == "all well"


def test_a_driver_without_a_torch_that_uses_it_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cuda_driver_version", lambda: "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (note,) = examine().notes
    assert note.startswith("an NVIDIA driver (CUDA 13.0) is installed but")


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flexvar_ext, "HAS_CUDA_KERNELS", False)
    monkeypatch.delenv(STRICT_VARIABLE, raising=False)
    assert choose_device("auto") == torch.device("cpu")
    assert "built without CUDA kernels" in capsys.readouterr().err
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    with pytest.raises(ValueError, match="--device auto: there is a GPU, but flexvar was built without CUDA kernels"):
        choose_device("auto")


def test_a_gpu_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(flexvar_ext, "HAS_CUDA_KERNELS", True)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"one that torch finds \(2 GPUs here\), got 'cuda:2'"):
        choose_device("cuda:2")
