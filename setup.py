"""Thin on purpose: CMakeLists.txt describes the build, pyproject.toml the package."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds all native targets with CMake and Ninja into the package folder flexvar_ext."""

    def run(self) -> None:
        # In place (editable installs too): next to the Python files. Otherwise into the tree that becomes the wheel.
        output = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "flexvar_ext"
        output.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DFLEXVAR_OUTPUT_DIR={output}"]
        # A cached value would outlive the environment's.
        for variable in ("FLEXVAR_CUDA", "CUDAARCHS", "FLEXVAR_TORCH_TARGET"):
            name = {"CUDAARCHS": "CMAKE_CUDA_ARCHITECTURES"}.get(variable, variable)
            configure.append(f"-D{name}={os.environ[variable]}" if os.environ.get(variable) else f"-U{name}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("flexvar_ext._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
