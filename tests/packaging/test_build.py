"""The build as a user meets it: a wheel from the source archive, CUDA where there is none, a broken install."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked: what the other tests build from, and nothing beside it."""
    folder = tmp_path_factory.mktemp("sources")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), "sdist", "-d", str(folder)]
    packed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert packed.returncode == 0, packed.stderr
    (archive,) = folder.glob("flexvar-*.tar.gz")
    shutil.unpack_archive(archive, folder)  # our own: Python before 3.10.12 and 3.11.4 has no filters for others'
    return folder / archive.name.removesuffix(".tar.gz")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_wheel_holds_both_packages_and_works_unpacked(sources: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", str(tmp_path)]
    built = run(*pip, str(sources), FLEXVAR_CUDA="off")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("flexvar-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for wanted in ("flexvar_ext/libflexvar_ops.so", "flexvar_ext/reference.py", "flexvar/cli.py", "flexvar/py.typed"):
        assert wanted in names
    assert {"flexvar/web/style.css", "flexvar/web/painter.js"} <= set(names)
    assert any(name.startswith("flexvar/demo/") and name.endswith(".safetensors") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) or name.endswith("_cuda.so") for name in names)

    program = "import flexvar, flexvar_ext; print(flexvar_ext.__file__, flexvar_ext.HAS_CUDA_KERNELS)"
    used = run(sys.executable, "-P", "-c", program, PYTHONPATH=str(tmp_path / "site"))
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == [str(tmp_path / "site/flexvar_ext/__init__.py"), "False"]


def test_cuda_asked_for_without_nvcc_is_an_error(sources: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"  # a PATH on which there is everything but nvcc
    tools.mkdir()
    for tool in ("cmake", "ninja", "c++", "g++", "gcc", "cc", "as", "ld", "ar", "ranlib", "uname", "sh", "objcopy"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    command = ["cmake", "-S", str(sources), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DFLEXVAR_OUTPUT_DIR={tmp_path}"]
    environment = {"PATH": str(tools), "CUDACXX": "", "CUDA_PATH": "", "CUDA_HOME": ""}
    asked = run(*command, "-DFLEXVAR_CUDA=on", **environment)
    assert asked.returncode != 0
    assert "FLEXVAR_CUDA=on needs nvcc" in asked.stderr

    wrong = run(*command, "-DFLEXVAR_CUDA=maybe", **environment)
    assert wrong.returncode != 0
    assert "FLEXVAR_CUDA must be auto, on or off, got 'maybe'" in wrong.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_without_cuda_in_torch_there_is_no_cuda_library(sources: Path, tmp_path: Path) -> None:
    """Whether there is an nvcc or not: nothing could load it."""
    command = ["cmake", "-S", str(sources), "-B", str(tmp_path / "build"), "-G", "Ninja", "-DFLEXVAR_CUDA=auto"]
    configured = run(*command, f"-DPython_EXECUTABLE={sys.executable}", f"-DFLEXVAR_OUTPUT_DIR={tmp_path}")
    assert configured.returncode == 0, configured.stderr
    assert "CPU only, no CUDA library will be built: this torch is a CPU build" in configured.stdout


@pytest.mark.parametrize(("testing", "stays"), [("OFF", False), ("ON", True)])
def test_only_what_replaces_a_cuda_library_removes_it(tmp_path: Path, testing: str, stays: bool) -> None:
    """A build without CUDA would leave one that does not match; the tests' module is built beside the libraries."""
    library = tmp_path / "libflexvar_ops_cuda.so"
    library.touch()
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", "-DFLEXVAR_CUDA=off"]
    command += [f"-DFLEXVAR_TESTING={testing}", f"-DPython_EXECUTABLE={sys.executable}"]
    configured = run(*command, f"-DFLEXVAR_OUTPUT_DIR={tmp_path}")
    assert configured.returncode == 0, configured.stderr
    assert library.exists() == stays


def test_missing_library_says_what_to_do(sources: Path) -> None:
    used = run(sys.executable, "-P", "-c", "import flexvar_ext", PYTHONPATH=str(sources))
    assert used.returncode != 0
    assert "libflexvar_ops.so is missing" in used.stderr
    assert "pip install --no-build-isolation" in used.stderr
