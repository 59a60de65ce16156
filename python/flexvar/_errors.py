"""Errors that a user can cause. No torch here: the command line needs it before anything is loaded."""

from __future__ import annotations


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no room for a tensor: it has no class of error for that on a CPU."""
    return any(text in str(error) for text in ("out of memory", "can't allocate memory"))
