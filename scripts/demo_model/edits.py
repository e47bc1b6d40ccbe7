"""Variants of a scene: the same at another size, and one that differs in a single thing."""

import math
import random
from collections import Counter
from dataclasses import replace

from scripts.demo_model.scene import COLORS, KINDS, MAX_SIDE, MIN_SIDE, Box, Scene, Shape
from scripts.demo_model.shapes import SMALLEST, outline, sample_shade
from scripts.demo_model.signs import fit_sign, letters_height, sample_word


def content(scene: Scene) -> Counter[str]:
    """The names of the shapes and the word of the sign, each with its count."""
    names = Counter(shape.name for shape in scene.shapes)
    if scene.sign is not None:
        names[scene.sign.word] = 1
    return names


def maybe_rescaled(scene: Scene, rng: random.Random) -> Scene:
    """The same scene, at another size half of the time."""
    return scene if rng.random() < 0.5 else rescaled(scene, rng)


def rescaled(scene: Scene, rng: random.Random) -> Scene:
    """The same scene at another size."""
    low = MIN_SIDE / scene.short
    high = MAX_SIDE / max(scene.width, scene.height)
    factor = rng.uniform(max(low, 0.6), min(high, 1.6))
    # Rounded so that neither the limits of sides nor that of the aspect ratio is violated.
    long = min(MAX_SIDE, max(MIN_SIDE, math.floor(max(scene.width, scene.height) * factor)))
    short = min(MAX_SIDE, max(MIN_SIDE, math.ceil(scene.short * factor)))
    width, height = (long, short) if scene.width >= scene.height else (short, long)
    fx, fy = width / scene.width, height / scene.height

    def scaled(box: Box) -> Box:
        return box[0] * fx, box[1] * fy, box[2] * fx, box[3] * fy

    sign = scene.sign
    if sign is not None:
        sign = fit_sign(sign.word, sign.font, scaled(sign.box), letters_height(sign) * fy, sign.ink)
    shapes = tuple(replace(shape, box=scaled(shape.box)) for shape in scene.shapes)
    return replace(scene, width=width, height=height, shapes=shapes, sign=sign)


def edited(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one change: a colour, a kind, a shape removed, or another word."""
    edits = ["color", "kind"]
    if len(scene.shapes) > 1:
        edits.append("remove")
    if scene.sign is not None:
        edits.append("word")
    edit = rng.choice(edits)
    i = rng.randrange(len(scene.shapes))
    shape = scene.shapes[i]
    before, after = scene.shapes[:i], scene.shapes[i + 1 :]
    if edit == "remove":
        return replace(scene, shapes=before + after)
    if edit == "word":
        return _with_another_word(scene, rng)
    changed = None
    if edit == "kind":
        changed = _with_kind(shape, rng.choice([k for k in KINDS if k != shape.kind]), scene.short)
    if changed is None:
        color = rng.choice([c for c in COLORS if c != shape.color])
        changed = replace(shape, color=color, shade=sample_shade(rng, color))
    return replace(scene, shapes=(*before, changed, *after))


def _with_another_word(scene: Scene, rng: random.Random) -> Scene:
    sign = scene.sign
    assert sign is not None
    word = sign.word
    while word == sign.word:
        word = sample_word(rng)
    return replace(scene, sign=fit_sign(word, sign.font, sign.box, letters_height(sign), sign.ink))


def _with_kind(shape: Shape, kind: str, short: int) -> Shape | None:
    """The shape as another kind within its old box, or None where that would be too small."""
    x0, y0, x1, y1 = shape.box
    sides = outline(kind, 0.0)[1]
    extent = min((x1 - x0) / sides[0], (y1 - y0) / sides[1])
    w, h = extent * sides[0], extent * sides[1]
    if min(w, h) < SMALLEST * short:
        return None
    x, y = (x0 + x1 - w) / 2, (y0 + y1 - h) / 2
    return replace(shape, kind=kind, box=(x, y, x + w, y + h), angle=0.0)
