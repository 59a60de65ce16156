"""Loss curves of a run as a PNG, from its log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from flexvar.image_io import save_png

CURVES_NAME = "curves.png"

_PANEL = (420, 260)
_MARGIN = 44
_COLUMNS = 3
_HIDDEN = ("step", "seconds")


def read_log(path: str | Path) -> dict[str, list[float]]:
    """The columns of a ``log.jsonl``. Raises ValueError for a missing or empty log, or a line that is not a step's."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"read_log: path must be a log of a training run, got {str(path)!r}")
    columns: dict[str, list[float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            for name, value in json.loads(line).items():
                columns.setdefault(name, []).append(float(value))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"read_log: line {number} of {str(path)!r} must be a step's JSON, got {line[:60]!r}"
            ) from error
    if not columns:
        raise ValueError(f"read_log: {str(path)!r} must hold at least one step, got none")
    return columns


def draw_curves(log: str | Path, png: str | Path) -> None:
    """Draws every column of a log over the steps, one panel each: the values in grey, their moving average in blue.

    Raises:
        ValueError: as :func:`read_log` and :func:`flexvar.image_io.save_png`.
        OSError: the picture cannot be written.
    """
    columns = {name: values for name, values in read_log(log).items() if name not in _HIDDEN}
    rows = -(-len(columns) // _COLUMNS)
    image = Image.new("RGB", (_PANEL[0] * min(_COLUMNS, len(columns)), _PANEL[1] * rows), "white")
    draw = ImageDraw.Draw(image)
    for index, (name, values) in enumerate(columns.items()):
        _draw_panel(draw, (index % _COLUMNS * _PANEL[0], index // _COLUMNS * _PANEL[1]), name, values)
    save_png(image, png)


def _draw_panel(draw: ImageDraw.ImageDraw, corner: tuple[int, int], name: str, values: Sequence[float]) -> None:
    left, top = corner[0] + _MARGIN, corner[1] + 24
    right, bottom = corner[0] + _PANEL[0] - 12, corner[1] + _PANEL[1] - 24
    smooth = _moving_average(values, max(1, len(values) // 50))
    low, high = min(smooth), max(smooth)  # single outliers would flatten the rest
    span = (high - low) or 1.0
    low, high = low - 0.1 * span, high + 0.1 * span

    def points(curve: Sequence[float]) -> list[tuple[float, float]]:
        across = (right - left) / max(1, len(curve) - 1)
        clipped = (min(max(value, low), high) for value in curve)
        return [
            (left + i * across, bottom - (value - low) / (high - low) * (bottom - top))
            for i, value in enumerate(clipped)
        ]

    draw.rectangle((left, top, right, bottom), outline="#888888")
    for curve, colour, width in ((values, "#d0d0d0", 1), (smooth, "#1f5fbf", 2)):
        if len(curve) > 1:
            draw.line(points(curve), fill=colour, width=width)
    draw.text((left, corner[1] + 8), f"{name}: {smooth[-1]:.4g}", fill="black")
    draw.text((corner[0] + 4, top), f"{high:.3g}", fill="#555555")
    draw.text((corner[0] + 4, bottom - 12), f"{low:.3g}", fill="#555555")
    draw.text((right - 60, bottom + 4), f"{len(values)} steps", fill="#555555")


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    averages, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        averages.append(total / min(index + 1, window))
    return averages
