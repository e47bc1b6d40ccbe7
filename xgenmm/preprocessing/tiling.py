"""An image cut into tiles.

Pure functions of an image and a `TilingConfig`; knows nothing of models, and does without PyTorch
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
class TiledImage:
    """One image as the tower wants it.

    pixels: uint8 [tiles, tile, tile, 3]; the whole image first, then the canvas row by row.
    columns, rows: the canvas in tiles; 0 x 0 if there is only the whole image.
    image_size: (width, height) of the image, from which the padding mask follows.
    """

    pixels: NDArray[np.uint8]
    columns: int
    rows: int
    image_size: Size

    @property
    def nbytes(self) -> int:
        """Bytes that the pixels take."""
        return self.pixels.nbytes


def tile_image(image: Image.Image, config: TilingConfig, tile: int) -> TiledImage:
    """Cut an RGB `image` into tiles of `tile` pixels a side."""
    whole = _to_square(image, config, tile)
    if config.mode != "anyres":
        return TiledImage(_stack([whole]), 0, 0, image.size)
    canvas_size = select_best_resolution(image.size, config.grids)
    canvas = resize_and_pad(image, canvas_size)
    columns, rows = canvas_size[0] // tile, canvas_size[1] // tile
    cells = [
        canvas.crop((x * tile, y * tile, (x + 1) * tile, (y + 1) * tile))
        for y in range(rows)
        for x in range(columns)
    ]
    return TiledImage(_stack([whole, *cells]), columns, rows, image.size)


def select_best_resolution(size: Size, grids: Sequence[Size]) -> Size:
    """The canvas that keeps most of the image's pixels; then the least waste, in list order."""
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(grids, key=merit)  # max keeps the first of equals


def resize_and_pad(image: Image.Image, canvas_size: Size) -> Image.Image:
    """The image resized into the canvas with its aspect kept, centred on black."""
    (width, height), (canvas_width, canvas_height) = image.size, canvas_size
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        fitted = (canvas_width, min(math.ceil(height * scale_x), canvas_height))
    else:
        fitted = (min(math.ceil(width * scale_y), canvas_width), canvas_height)
    canvas = Image.new("RGB", canvas_size)
    corner = ((canvas_width - fitted[0]) // 2, (canvas_height - fitted[1]) // 2)
    canvas.paste(image.resize(fitted), corner)
    return canvas


def _to_square(image: Image.Image, config: TilingConfig, tile: int) -> Image.Image:
    if config.mode == "pad" and image.width != image.height:
        side = max(image.size)
        mean = tuple(int(255 * value) for value in config.mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((tile, tile), Image.Resampling.BICUBIC)


def _stack(images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in images])
