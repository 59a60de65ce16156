"""The tests of the CPU ops that use Intel's tile unit (AMX), with that unit emulated: for CPUs that have none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexvar_ext import _host

ROOT = Path(__file__).parents[2]
LIBRARIES = Path(__file__).parent / "tiles"  # made by `make tiles`
SCRIPT = """
import sys

import pytest
from flexvar_ext import _host  # of this folder

assert _host.cpu_isa() == "amx", _host.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(_host.cpu_isa() not in ("avx512bf16", "amx"), reason="the emulation needs AVX512-BF16")
def test_ops_on_emulated_tiles(tmp_path):
    built = list(LIBRARIES.glob("*.so"))
    if not built and os.environ.get("FLEXVAR_REQUIRE_EMULATED") != "1":
        pytest.skip("build it with `make tiles` (FLEXVAR_REQUIRE_EMULATED=1 turns this into a failure)")
    (tmp_path / "flexvar_ext").mkdir()
    for file in [*(ROOT / "flexvar_ext").glob("*.py"), *built]:
        (tmp_path / "flexvar_ext" / file.name).symlink_to(file)
    (tmp_path / "run.py").write_text(SCRIPT)
    tests = [
        *(ROOT / "tests/ops").glob("test_vq_lookup*.py"),
        *(ROOT / "tests/ops").glob("test_scale_attention*.py"),
        *(ROOT / "tests/ops" / f"test_{op}.py" for op in ("conv3x3", "linear")),
    ]
    options = ["-k", "amx or thread or batch or depend", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, tmp_path / "run.py", *tests, *options],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "FLEXVAR_CPU_ISA"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
