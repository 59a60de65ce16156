"""What the frozen dataclass configs share: validation, and conversion from and to a JSON dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, TypeVar

ConfigT = TypeVar("ConfigT", bound="JsonConfig")

RESAMPLE_MODES = ("nearest", "bilinear", "bicubic", "area")  # of flexvar_ext.resample2d


class JsonConfig:
    """Base of the configs. Each validates its fields in ``__post_init__``: a ValueError or TypeError names the one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values (tuples become lists)."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """The config that :meth:`to_dict` described; fields that are absent keep their defaults.

        Raises:
            TypeError: ``values`` is not a mapping, or a field has the wrong type.
            ValueError: a name is not a field of this config, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}: values must be a mapping, got {type(values).__name__}")
        names = {field.name for field in fields(cls)}
        unknown = sorted(str(name) for name in values if name not in names)
        if unknown:
            raise ValueError(
                f"{cls.__name__}: fields must be among {', '.join(sorted(names))}, got {', '.join(unknown)}"
            )
        return cls(**values)

    def _check_int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{type(self).__name__}: {name} must be an int, got {value!r:.100}")
        if not low <= value <= high:
            raise ValueError(f"{type(self).__name__}: {name} must be from {low} to {high}, got {value!s:.100}")

    def _check_probability(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{type(self).__name__}: {name} must be a float, got {value!r:.100}")
        if not 0 <= value < 1:
            raise ValueError(f"{type(self).__name__}: {name} must be at least 0 and below 1, got {value!s:.100}")

    def _check_bool(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise TypeError(f"{type(self).__name__}: {name} must be a bool, got {value!r:.100}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{type(self).__name__}: {name} must be one of {', '.join(choices)}, got {value!r:.100}")
