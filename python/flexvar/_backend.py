"""Which implementation of the ops a model runs on."""

from __future__ import annotations

from types import ModuleType

BACKENDS = ("native", "reference")


def check_backend(backend: str) -> str:
    """Return ``backend``, or raise ValueError when it is neither "native" nor "reference"."""
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "native" or "reference", got {backend!r:.100}')
    return backend


def ops(backend: str) -> ModuleType:
    """The module that holds the ops: :mod:`flexvar_ext`, or the plain-PyTorch :mod:`flexvar_ext.reference`.

    Models keep the backend's name rather than the module, which could be neither copied nor pickled.
    """
    if backend == "reference":
        from flexvar_ext import reference

        return reference
    import flexvar_ext

    return flexvar_ext
