"""Small helpers for checking arguments."""

from __future__ import annotations

from torch import Tensor


def describe(value: object) -> str:
    """What an error message says about a value of the wrong type: the dtype of a tensor, the type of anything else."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
