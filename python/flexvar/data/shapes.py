"""Twelve shapes as signed distances: negative inside, positive outside, the outline at zero.

Every function takes coordinates ``x`` (right) and ``y`` (down) of any common shape, in units of the shape's radius, and
returns an array of that shape. The shape lies within the unit circle, upright. Values are distances near the outline,
which is all that antialiasing needs; far from it they are only bounds. Polygons are unions (``minimum``) and
intersections (``maximum``) of half-planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def _half_plane(x: Array, y: Array, start: tuple[float, float], end: tuple[float, float]) -> Array:
    """Signed distance to the line from start to end; inside is on its right (clockwise polygons as seen, y down)."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    offset = (start[0] * dy - start[1] * dx) / length
    return x * np.float32(dy / length) - y * np.float32(dx / length) - np.float32(offset)


def _convex(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    """A convex polygon from its corners, clockwise as seen on screen."""
    distance = _half_plane(x, y, corners[-1], corners[0])
    for start, end in pairwise(corners):
        np.maximum(distance, _half_plane(x, y, start, end), out=distance)
    return distance


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height))


def circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - np.float32(0.9)


def ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - np.float32(0.73)) - np.float32(0.22)


def crescent(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y) - np.float32(0.95), np.float32(0.76) - np.hypot(x - np.float32(0.48), y))


def capsule(x: Array, y: Array) -> Array:
    beyond = np.maximum(np.abs(x) - np.float32(0.62), np.float32(0))
    return np.hypot(beyond, y) - np.float32(0.36)


def square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.72, 0.72)


def triangle(x: Array, y: Array) -> Array:
    return _convex(x, y, [(0.0, -0.95), (0.9, 0.65), (-0.9, 0.65)])


def star(x: Array, y: Array) -> Array:
    # In polar coordinates all ten edges fold onto the one from a tip (at 0 degrees) to the valley beside it (at 36).
    sector = np.float32(math.radians(72))
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - sector * np.round(angle / sector))
    radius = np.hypot(x, y)
    valley = (0.45 * math.sin(math.radians(36)), -0.45 * math.cos(math.radians(36)))
    return _half_plane(radius * np.sin(angle), -radius * np.cos(angle), (0.0, -1.0), valley)


def cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.9, 0.29), _box(x, y, 0.29, 0.9))


def heart(x: Array, y: Array) -> Array:
    # A square of side 1.05 standing on a corner, with a disc on each of its two upper sides.
    x, y = np.abs(x), y - np.float32(0.14)
    quarter_diagonal = np.float32(1.05 * math.sqrt(2) / 4)
    diamond = (x + np.abs(y)) * np.float32(math.sqrt(0.5)) - np.float32(0.525)
    lobe = np.hypot(x - quarter_diagonal, y + quarter_diagonal) - np.float32(0.525)
    return np.minimum(diamond, lobe)


def arrow(x: Array, y: Array) -> Array:
    head = _convex(x, y, [(0.95, 0.0), (0.1, 0.75), (0.1, -0.75)])
    shaft = _box(x + np.float32(0.35), y, 0.55, 0.25)
    return np.minimum(head, shaft)


def hourglass(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(y - np.float32(0.8), _half_plane(x, y, (0.08, 0.0), (0.7, 0.8)))


def bolt(x: Array, y: Array) -> Array:
    upper = _convex(x, y, [(0.25, -0.97), (0.2, 0.2), (-0.55, 0.2)])
    lower = _convex(x, y, [(-0.25, 0.97), (-0.2, -0.2), (0.55, -0.2)])
    return np.minimum(upper, lower)


SIGNED_DISTANCES: tuple[Callable[[Array, Array], Array], ...] = (
    circle,
    ring,
    crescent,
    capsule,
    square,
    triangle,
    star,
    cross,
    heart,
    arrow,
    hourglass,
    bolt,
)
SHAPE_NAMES: tuple[str, ...] = tuple(shape.__name__ for shape in SIGNED_DISTANCES)
