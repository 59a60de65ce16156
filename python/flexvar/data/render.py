"""One shape on a background, antialiased, at any size and aspect ratio.

What is random about an image (place, size, rotation, colours, background) is drawn first, as a :class:`Scene`;
drawing a scene is then a pure function, done for many images at once.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexvar.data.shapes import SHAPE_NAMES, SIGNED_DISTANCES

MAX_ROTATION = math.radians(25)  # either way; enough to vary, too little to turn one class into another
MAX_SIDE = 4096

PLAIN, GRADIENT, STRIPES = 0, 1, 2


@dataclass(frozen=True)
class Scene:
    """What one image shows. Lengths are in units of the image's shorter side, colours are RGB in [0, 1]."""

    centre: tuple[float, float]  # (x, y) from the upper left corner
    radius: float
    rotation: float  # radians
    colour: tuple[float, float, float]
    background: int  # PLAIN, GRADIENT or STRIPES
    background_colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    background_angle: float  # radians, the direction in which gradient and stripes change
    stripes: float  # stripes per shorter side


def draw_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Draws a scene for an image of height × width pixels. The shape always lies within the image."""
    shorter = min(height, width)
    u = rng.random(12)
    radius = 0.30 + 0.14 * u[0]
    margin = radius + 0.02
    centre = (
        margin + (width / shorter - 2 * margin) * u[1],
        margin + (height / shorter - 2 * margin) * u[2],
    )
    hue = u[3]
    colour = colorsys.hsv_to_rgb(hue, 0.75 + 0.25 * u[4], 0.85 + 0.15 * u[5])
    # A background of another hue that is either pale or dark, so that the shape stands out.
    other_hue = hue + 0.25 + 0.5 * u[6]
    dark = u[7] < 0.5
    saturation, value, change = (0.6, 0.12 + 0.15 * u[8], 0.12) if dark else (0.18, 0.98 - 0.12 * u[8], -0.12)
    first = colorsys.hsv_to_rgb(other_hue % 1, saturation, value)
    second = colorsys.hsv_to_rgb((other_hue + 0.05) % 1, saturation, value + change)
    return Scene(
        centre=centre,
        radius=radius,
        rotation=MAX_ROTATION * (2 * u[9] - 1),
        colour=colour,
        background=(PLAIN, PLAIN, GRADIENT, GRADIENT, STRIPES)[int(5 * u[10])],
        background_colours=(first, second),
        background_angle=math.tau * u[11],
        stripes=3.0,
    )


def draw_images(classes: Sequence[int], scenes: Sequence[Scene], height: int, width: int) -> NDArray[np.uint8]:
    """Draws scenes[i] with the shape of class classes[i]: uint8 RGB [N, height, width, 3]."""
    shorter = min(height, width)
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(shorter)
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(shorter)
    images = np.empty((len(scenes), height, width, 3), np.uint8)
    for image, class_index, scene in zip(images, classes, scenes, strict=True):
        coverage = _coverage(class_index, scene, x, y, shorter)
        blend = _background_blend(scene, x, y, shorter)
        for channel in range(3):
            first, second = (np.float32(255 * colour[channel]) for colour in scene.background_colours)
            background = first + (second - first) * blend
            value = background + coverage * (np.float32(255 * scene.colour[channel]) - background)
            image[..., channel] = value + np.float32(0.5)
    return images


def render_batch(
    classes: Sequence[int], height: int, width: int, rngs: Sequence[np.random.Generator]
) -> NDArray[np.uint8]:
    """Images of the given classes, each drawn with its own generator: uint8 RGB [N, height, width, 3].

    Raises:
        ValueError: a class outside [0, 12), a side outside [8, 4096], or another number of generators than classes.
    """
    for name, side in (("height", height), ("width", width)):
        if not 8 <= side <= MAX_SIDE:
            raise ValueError(f"render: {name} must be in [8, {MAX_SIDE}] pixels, got {side}")
    for class_index in classes:
        if not 0 <= class_index < len(SHAPE_NAMES):
            raise ValueError(f"render: class_index must be in [0, {len(SHAPE_NAMES)}), got {class_index}")
    if len(rngs) != len(classes):
        raise ValueError(f"render: rngs must be one for each of the {len(classes)} classes, got {len(rngs)}")
    return draw_images(classes, [draw_scene(rng, height, width) for rng in rngs], height, width)


def render(class_index: int, height: int, width: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One image of class ``SHAPE_NAMES[class_index]``: uint8 RGB [height, width, 3]. Errors as :func:`render_batch`."""
    return render_batch([class_index], height, width, [rng])[0]


def _coverage(
    class_index: int, scene: Scene, x: NDArray[np.float32], y: NDArray[np.float32], pixels_per_unit: int
) -> NDArray[np.float32]:
    """The part of each pixel that the shape covers, in [0, 1]."""
    cos, sin = math.cos(scene.rotation) / scene.radius, math.sin(scene.rotation) / scene.radius
    dx, dy = x[None, :] - np.float32(scene.centre[0]), y[:, None] - np.float32(scene.centre[1])
    shape_x = dx * np.float32(cos) + dy * np.float32(sin)
    shape_y = dy * np.float32(cos) - dx * np.float32(sin)
    distance = SIGNED_DISTANCES[class_index](shape_x, shape_y)
    return np.clip(np.float32(0.5) - distance * np.float32(scene.radius * pixels_per_unit), 0, 1)


def _background_blend(
    scene: Scene, x: NDArray[np.float32], y: NDArray[np.float32], pixels_per_unit: int
) -> NDArray[np.float32]:
    """How far each pixel's background is from the first colour towards the second, in [0, 1]."""
    if scene.background == PLAIN:
        return np.zeros((len(y), len(x)), np.float32)
    cos, sin = math.cos(scene.background_angle), math.sin(scene.background_angle)
    along = x[None, :] * np.float32(cos) + y[:, None] * np.float32(sin)
    if scene.background == GRADIENT:
        low, high = min(0.0, cos * x[-1]) + min(0.0, sin * y[-1]), max(0.0, cos * x[-1]) + max(0.0, sin * y[-1])
        return (along - np.float32(low)) / np.float32(high - low)
    # A triangle wave cut to stripes, with edges one pixel wide.
    wave = np.abs(np.mod(along * np.float32(scene.stripes), np.float32(1)) - np.float32(0.5)) - np.float32(0.25)
    return np.clip(np.float32(0.5) + wave * np.float32(pixels_per_unit / scene.stripes), 0, 1)
