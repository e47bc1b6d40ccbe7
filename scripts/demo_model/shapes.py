"""Shapes: their outlines, the shades of their colours, and free places for them."""

import colorsys
import math
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from scripts.demo_model.scene import KINDS, MIN_SHAPE, Box, Rgb, Shape

SMALLEST = 1.02 * MIN_SHAPE  # leaves room for the rounding of an image's sides

# Hue in degrees, then saturation and value. The ranges include the colours of these names in CSS
# and matplotlib and keep a distance from each other.
_SHADES: Mapping[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-8, 4), (0.78, 1.0), (0.7, 1.0)),
    "orange": ((23, 38), (0.8, 1.0), (0.92, 1.0)),
    "yellow": ((50, 62), (0.7, 1.0), (0.9, 1.0)),
    "green": ((98, 155), (0.55, 1.0), (0.4, 0.9)),
    "blue": ((205, 240), (0.7, 1.0), (0.6, 1.0)),
    "purple": ((270, 302), (0.5, 1.0), (0.42, 0.75)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.14)),
}
# The largest rotation of a shape in degrees, either way.
_MAX_ANGLES = {"circle": 0.0, "square": 12.0, "triangle": 15.0, "star": 18.0}


def sample_shade(rng: random.Random, color: str) -> Rgb:
    """Sample one of the colours that `color` names."""
    hue, saturation, value = (rng.uniform(*limits) for limits in _SHADES[color])
    r, g, b = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


@lru_cache(maxsize=4096)
def outline(kind: str, angle: float) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The corner points of a rotated shape and the relative size of its bounding box.

    Returns:
        Points as float64 [points, 2], scaled so that the bounding box goes from 0 to 1, and the
        box's width and height, the longer of which is 1.
    """
    if kind == "circle":
        turns = np.arange(32) / 32
        radii = np.ones(32)
    elif kind == "square":
        turns, radii = np.arange(4) / 4 + 1 / 8, np.ones(4)
    elif kind == "triangle":
        turns, radii = np.arange(3) / 3 - 1 / 4, np.ones(3)
    elif kind == "star":
        turns, radii = np.arange(10) / 10 - 1 / 4, np.tile([1.0, 0.42], 5)
    else:
        raise ValueError(f"kind: unknown shape {kind!r}; must be one of {', '.join(KINDS)}")
    phase = 2 * np.pi * turns - math.radians(angle)
    points = radii[:, None] * np.stack([np.cos(phase), np.sin(phase)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    sides = (high - low) / (high - low).max()
    return (points - low) / (high - low), (float(sides[0]), float(sides[1]))


def corners(shape: Shape) -> NDArray[np.float64]:
    """The shape's corner points in the image, float64 [points, 2]."""
    x0, y0, x1, y1 = shape.box
    points, _ = outline(shape.kind, shape.angle)
    return points * (x1 - x0, y1 - y0) + (x0, y0)


def place_shape(
    rng: random.Random, kind: str, size: float, width: int, height: int, taken: Sequence[Box]
) -> Shape | None:
    """Sample a place in the image that is clear of the boxes in `taken`.

    Args:
        size: of the shape's longer side, as a share of the image's shorter side. It shrinks with
            every attempt.

    Returns:
        A shape without colour, or None after 30 attempts.
    """
    short = min(width, height)
    angle = rng.uniform(-_MAX_ANGLES[kind], _MAX_ANGLES[kind])
    gap = max(2.0, 0.04 * short)
    aspect_w, aspect_h = outline(kind, angle)[1]
    smallest = SMALLEST / min(aspect_w, aspect_h)
    for attempt in range(30):
        extent = max(smallest, size * 0.95**attempt) * short
        w, h = extent * aspect_w, extent * aspect_h
        x = rng.uniform(1, width - w - 1)
        y = rng.uniform(1, height - h - 1)
        box = (x, y, x + w, y + h)
        if not any(overlap(box, other, gap) for other in taken):
            return Shape(kind, "", box, angle, (0, 0, 0))
    return None


def overlap(a: Box, b: Box, gap: float) -> bool:
    """Whether less than `gap` pixels separate two boxes."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap
