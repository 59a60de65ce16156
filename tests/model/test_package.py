"""What ``import flexvar`` gives, and what it does not do."""

from __future__ import annotations

import subprocess
import sys

import flexvar
import pytest


def test_everything_public_is_there() -> None:
    for name in flexvar.__all__:
        assert getattr(flexvar, name).__name__ == name
        assert name in dir(flexvar)
    with pytest.raises(AttributeError, match="module 'flexvar' has no attribute 'nothing'"):
        flexvar.nothing  # noqa: B018


def test_importing_has_no_side_effects() -> None:
    code = "import sys, flexvar, flexvar.schedule; print({'torch', 'numpy', 'flexvar_ext', 'PIL'} & set(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed == "set()\n"
