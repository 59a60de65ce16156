"""Loads the native libraries, and says what to do when they do not load."""

from __future__ import annotations

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
OPS_LIBRARY = _FOLDER / "libflexvar_ops.so"
CUDA_LIBRARY = _FOLDER / "libflexvar_ops_cuda.so"


def load_libraries() -> bool:
    """Registers the native ops with torch.

    Returns:
        Whether the CUDA kernels were registered: they are when this torch is a CUDA build and the library was built.

    Raises:
        ImportError: names the library, the cause and the remedy.
    """
    if not OPS_LIBRARY.is_file():
        raise ImportError(
            f"flexvar_ext: {OPS_LIBRARY} is missing, so the native ops were not built for this checkout. "
            "Run `pip install --no-build-isolation -e .` (or `make setup`) in the project's folder."
        )
    _load(OPS_LIBRARY)
    if torch.version.cuda is None or not CUDA_LIBRARY.is_file():
        return False
    _load(CUDA_LIBRARY)
    return True


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"flexvar_ext: {library.name} does not load under torch {torch.__version__}: {error}. Likely causes: a "
            "torch older than 2.11, or a build made for another Python or libstdc++. Rebuild with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .`"
        ) from error
