"""Sample scenes of the demo's world, and pages of signs to learn letters from.

All randomness comes from the `random.Random` that the caller passes in, so equal seeds give equal
scenes in any process.
"""

import colorsys
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scripts.demo_model.scene import (
    COLORS,
    KINDS,
    LETTERS,
    MAX_ASPECT,
    MAX_SHAPE,
    MAX_SIDE,
    MIN_SIDE,
    Box,
    Rgb,
    Scene,
    Shape,
)
from scripts.demo_model.shapes import SMALLEST, place_shape, sample_shade
from scripts.demo_model.signs import INKS, fit_sign, sample_sign, text_extent


def sample_scene(
    rng: random.Random, fonts: Sequence[Path], *, level: float, with_sign: bool | None = None
) -> Scene:
    """Sample a scene.

    Args:
        rng: the only source of randomness.
        fonts: fonts for the sign.
        level: difficulty from 0 (nearly square images, one or two large shapes, large letters) to
            1 (everything). A higher level includes the scenes of lower ones.
        with_sign: whether there is a sign; None gives one to a third of the scenes.
    """
    if with_sign is None:
        with_sign = rng.random() < 1 / 3
    width, height = _sample_size(rng, level)
    taken: list[Box] = []
    sign = sample_sign(rng, fonts, width, height, level) if with_sign else None
    if sign is not None:
        taken.append(sign.box)

    # Repeated kinds and colours make counts and names interesting, so half of the scenes have few.
    kinds = rng.sample(KINDS, 2) if rng.random() < 0.3 else list(KINDS)
    colors = rng.sample(COLORS, 2) if rng.random() < 0.3 else list(COLORS)
    count = rng.choices((1, 2, 3, 4), (1, 1 + level, 2 * level, 2 * level))[0]
    low = 0.3 + (SMALLEST - 0.3) * level
    high = MAX_SHAPE * (1 if count < 3 and sign is None else 0.85)
    shapes: list[Shape] = []
    for size in sorted((rng.uniform(low, high) for _ in range(count)), reverse=True):
        shape = place_shape(rng, rng.choice(kinds), size, width, height, taken)
        if shape is not None:
            taken.append(shape.box)
            color = rng.choice(colors)
            shapes.append(replace(shape, color=color, shade=sample_shade(rng, color)))
    if not shapes:
        return sample_scene(rng, fonts, level=level, with_sign=with_sign)
    rng.shuffle(shapes)
    return Scene(width, height, sample_background(rng), tuple(shapes), sign)


def _sample_size(rng: random.Random, level: float) -> tuple[int, int]:
    """Sample width and height: first the aspect ratio, log-uniform, then the longer side."""
    limit = 1.25 * (MAX_ASPECT / 1.25) ** level
    aspect = math.exp(rng.uniform(-math.log(limit), math.log(limit)))
    ratio = max(aspect, 1 / aspect)
    long = rng.uniform(max(MIN_SIDE * ratio, 64 + 64 * (1 - level)), MAX_SIDE)
    # Rounded so that neither the smallest side nor the largest aspect ratio is violated.
    short = max(MIN_SIDE, math.ceil(long / ratio))
    long_side = min(MAX_SIDE, max(short, round(long)))
    return (long_side, short) if aspect >= 1 else (short, long_side)


def sample_background(rng: random.Random) -> Rgb:
    """Sample white or a light, almost grey colour."""
    if rng.random() < 0.3:
        return (255, 255, 255)
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.1), rng.uniform(0.88, 1))
    return round(r * 255), round(g * 255), round(b * 255)


def sample_page(rng: random.Random, fonts: Sequence[Path]) -> list[Scene]:
    """Sample a page of signs to learn letters from: scenes of one size with one sign each.

    The signs are stacked; `draw_page` draws them in one image. Letters are as large, and as
    squeezed, as in the tiles of a scene.
    """
    width, height = rng.randint(120, 480), rng.randint(120, 480)
    background = sample_background(rng)
    scenes: list[Scene] = []
    top = rng.uniform(0.0, 0.1) * height
    while True:
        path = rng.choice(fonts)
        word = "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))
        text_w, text_h = text_extent(word, path)
        letter_height = min(rng.uniform(0.1, 0.5) * height, 0.9 * width * text_h / text_w)
        bottom = top + letter_height * rng.uniform(1.3, 1.8)
        if bottom > height:
            return scenes or sample_page(rng, fonts)
        margin = (width - letter_height * text_w / text_h) / 2 * rng.uniform(0.1, 0.9)
        shift = rng.uniform(-1, 1) * margin * 0.9
        box = (max(0.0, margin + shift), top, min(width, width - margin + shift), bottom)
        ink = rng.choice(INKS)
        sign = fit_sign(word, path, box, letter_height, ink)
        scenes.append(Scene(width, height, background, (), sign))
        top = bottom + rng.uniform(0.0, 0.1) * height
