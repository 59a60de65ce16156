"""The check of whole numbers. No torch here: the command line needs it before anything is loaded."""

from __future__ import annotations

import operator
from typing import Any


def check_integer(name: str, value: Any, low: int, high: int | None = None, *, op: str) -> int:
    """The value as an int. Raises TypeError when it is none, ValueError when it is out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an int, got {value!r:.100}") from None
    if isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {value!r:.100}")
    if number < low or (high is not None and number > high):
        rule = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{op}: {name} must be {rule}, got {number!s:.100}")
    return number
