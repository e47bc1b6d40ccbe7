"""A picture cut into tiles.

Pure functions of a picture and a `TilingConfig`; knows nothing of models, and does without PyTorch
in processes that only read. Sizes are (width, height), grids of tiles are (columns, rows). Follows
the original `Blip3ImageProcessor` (any-resolution code descends from LLaVA-NeXT's `mm_utils.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xgenmm.config import Size, TilingConfig


@dataclass(frozen=True)
class Tiles:
    """One picture as the tower wants it.

    pixels: uint8 [tiles, tile, tile, 3]; the whole picture first, then the canvas row by row.
    columns, rows: the canvas in tiles; 0 x 0 if there is only the whole picture.
    picture_size: (width, height) of the picture, from which the padding mask follows.
    """

    pixels: NDArray[np.uint8]
    columns: int
    rows: int
    picture_size: Size

    @property
    def nbytes(self) -> int:
        """Bytes that the pixels take."""
        return self.pixels.nbytes


def tile_picture(picture: Image.Image, config: TilingConfig, tile: int) -> Tiles:
    """Cut an RGB `picture` into tiles of `tile` pixels a side."""
    whole = _to_square(picture, config, tile)
    if config.mode != "anyres":
        return Tiles(_stack([whole]), 0, 0, picture.size)
    canvas_size = best_canvas(picture.size, config.grids)
    canvas = fit_canvas(picture, canvas_size)
    columns, rows = canvas_size[0] // tile, canvas_size[1] // tile
    cells = [
        canvas.crop((x * tile, y * tile, (x + 1) * tile, (y + 1) * tile))
        for y in range(rows)
        for x in range(columns)
    ]
    return Tiles(_stack([whole, *cells]), columns, rows, picture.size)


def best_canvas(size: Size, grids: Sequence[Size]) -> Size:
    """The canvas that keeps most of the picture's pixels; then the least waste, in list order."""
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(grids, key=merit)  # max keeps the first of equals


def fit_canvas(picture: Image.Image, canvas_size: Size) -> Image.Image:
    """The picture resized into the canvas with its aspect kept, centred on black."""
    (width, height), (canvas_width, canvas_height) = picture.size, canvas_size
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        fitted = (canvas_width, min(math.ceil(height * scale_x), canvas_height))
    else:
        fitted = (min(math.ceil(width * scale_y), canvas_width), canvas_height)
    canvas = Image.new("RGB", canvas_size)
    corner = ((canvas_width - fitted[0]) // 2, (canvas_height - fitted[1]) // 2)
    canvas.paste(picture.resize(fitted), corner)
    return canvas


def _to_square(picture: Image.Image, config: TilingConfig, tile: int) -> Image.Image:
    if config.mode == "pad" and picture.width != picture.height:
        side = max(picture.size)
        mean = tuple(int(255 * value) for value in config.mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return picture.resize((tile, tile), Image.Resampling.BICUBIC)


def _stack(pictures: Sequence[Image.Image]) -> NDArray[np.uint8]:
    return np.stack([np.asarray(picture) for picture in pictures])
