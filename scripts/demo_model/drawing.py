"""Draw scenes as images."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from scripts.demo_model.fonts import load_font
from scripts.demo_model.scene import Scene, Shape, Sign
from scripts.demo_model.shapes import corners
from scripts.demo_model.signs import glyphs


def draw(scene: Scene) -> Image.Image:
    """Draw the scene, anti-aliased, as an RGB image of its width and height."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    for shape in scene.shapes:
        _draw_shape(image, shape)
    if scene.sign is not None:
        _draw_sign(image, scene.sign, scene.short)
    return image


def draw_page(scenes: Sequence[Scene]) -> Image.Image:
    """Draw the signs of `scenes`, which all have the same size, in one image."""
    image = draw(scenes[0])
    for scene in scenes[1:]:
        if scene.sign is not None:
            _draw_sign(image, scene.sign, scene.short)
    return image


def _draw_shape(image: Image.Image, shape: Shape) -> None:
    """Draw the shape's mask enlarged, then shrink it, which smooths its edges cheaply."""
    x0, y0 = math.floor(shape.box[0]), math.floor(shape.box[1])
    w, h = math.ceil(shape.box[2]) - x0, math.ceil(shape.box[3]) - y0
    factor = 4 if max(w, h) <= 100 else 2
    mask = Image.new("L", (w * factor, h * factor))
    pen = ImageDraw.Draw(mask)
    if shape.kind == "circle":
        box = [(v - o) * factor for v, o in zip(shape.box, (x0, y0, x0, y0), strict=True)]
        pen.ellipse((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    else:
        # Pillow's integer coordinates are pixel centres, ours are pixel corners.
        points = (corners(shape) - (x0, y0)) * factor - 0.5
        pen.polygon(points.ravel().tolist(), fill=255)
    image.paste(shape.shade, (x0, y0), mask.reduce(factor))


def _draw_sign(image: Image.Image, sign: Sign, short: int) -> None:
    pen = ImageDraw.Draw(image)
    x0, y0, x1, y1 = (round(v) for v in sign.box)
    border = max(1, round(0.012 * short))
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=(255, 255, 255), outline=sign.ink, width=border)
    font = load_font(sign.font, sign.font_size)
    measured = glyphs(sign.font, sign.font_size)
    for letter, box in zip(sign.word, sign.letters, strict=True):
        (left, top, _, _), _ = measured[letter]
        pen.text((box[0] - left, box[1] - top), letter, fill=sign.ink, font=font, anchor="ls")
