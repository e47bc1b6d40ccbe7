"""Any-resolution tiling: an image is cut into tiles of the vision tower's input size.

Pure functions of an image and a `TilingConfig`, without PyTorch. Sizes are (width, height) in
pixels, grids are (columns, rows) in tiles. Follows the original `Blip3ImageProcessor`, whose
any-resolution code comes from LLaVA-NeXT (`llava/mm_utils.py`).
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xgenmm.config import Size, TilingConfig


@dataclass(frozen=True)
class TiledImage:
    """The tiles of one image.

    Attributes:
        pixels: uint8 [tiles, tile_size, tile_size, 3]: first the base tile (the whole image,
            resized), then the tiles of the canvas, row by row.
        columns, rows: grid of the canvas in tiles; 0 x 0 if there is only the base tile.
        image_size: (width, height) of the original image, from which the padding mask is computed.
    """

    pixels: NDArray[np.uint8]
    columns: int
    rows: int
    image_size: Size

    @property
    def nbytes(self) -> int:
        """Memory taken by the pixels."""
        return self.pixels.nbytes


def tile_image(image: Image.Image, config: TilingConfig, tile_size: int) -> TiledImage:
    """Cut an RGB image into square tiles of `tile_size` pixels a side.

    The two resizes of an any-resolution image run at the same time: Pillow releases the GIL.
    """
    image.load()  # a file that `Image.open` has not decoded yet must not be decoded by two threads
    to_tile = partial(_resize_to_tile, image, config, tile_size)
    if config.mode != "anyres":
        return TiledImage(_stack([to_tile()]), 0, 0, image.size)
    future = _start(to_tile)
    canvas_size = select_best_resolution(image.size, config.grids)
    canvas = resize_and_pad(image, canvas_size)
    base = future.result()
    columns, rows = canvas_size[0] // tile_size, canvas_size[1] // tile_size
    tiles = [
        canvas.crop((x, y, x + tile_size, y + tile_size))
        for y in range(0, rows * tile_size, tile_size)
        for x in range(0, columns * tile_size, tile_size)
    ]
    return TiledImage(_stack([base, *tiles]), columns, rows, image.size)


def select_best_resolution(size: Size, grids: Sequence[Size]) -> Size:
    """Choose the canvas of highest effective resolution, then of least wasted area.

    The effective resolution is the number of the image's own pixels that survive resizing; ties
    go to the first canvas in the list.
    """
    width, height = size

    def score(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(grids, key=score)  # the first of equal scores


def resize_and_pad(image: Image.Image, canvas_size: Size) -> Image.Image:
    """Resize an image to fit the canvas, keeping its aspect ratio, and center it on black.

    Rounds as the original does: the new size up, the offset down. The filter is Pillow's default
    (bicubic).
    """
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


def _resize_to_tile(image: Image.Image, config: TilingConfig, tile_size: int) -> Image.Image:
    """Resize the whole image to one tile; mode "pad" first pads it to a square of mean color."""
    if config.mode == "pad" and image.width != image.height:
        side = max(image.size)
        mean = tuple(int(255 * value) for value in config.mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((tile_size, tile_size), Image.Resampling.BICUBIC)


def _start(function: Callable[[], Image.Image]) -> "Future[Image.Image]":
    """Run a function in a thread of its own.

    A shared executor would lack its threads in a forked process, and refuses work as soon as the
    main thread has ended; starting a thread takes less than 0.1 ms.
    """
    future: Future[Image.Image] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="xgenmm-resize").start()
    return future


def _stack(images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    return np.stack([np.asarray(image) for image in images])
