"""A picture cut into tiles, and the regrouping that the sampler was trained on.

Pure functions of a picture and a `TilingConfig`; knows nothing of models. Sizes are (width,
height), grids of tiles are (columns, rows). Follows the original `Blip3ImageProcessor`
(any-resolution code descends from LLaVA-NeXT's `mm_utils.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from xgenmm.config import Size, TilingConfig


@dataclass(frozen=True)
class Tiles:
    """One picture as the tower wants it.

    pixels: uint8 [tiles, tile, tile, 3]; the whole picture first, then the canvas row by row.
    columns, rows: the canvas in tiles; 0 x 0 if there is only the whole picture.
    picture_size: (width, height) of the picture, from which the padding mask follows.
    """

    pixels: torch.Tensor
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


def normalise(pixels: torch.Tensor, config: TilingConfig, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [tiles, tile, tile, 3] -> `dtype` [tiles, 3, tile, tile], on the pixels' own device."""
    mean = torch.tensor(config.mean, device=pixels.device)
    std = torch.tensor(config.std, device=pixels.device)
    values = (pixels.to(torch.float32) / 255 - mean) / std
    return values.permute(0, 3, 1, 2).to(dtype)


def regroup(features: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """Features of the tiles as the sampler gets them: [1 + rows * columns, side**2, width].

    The canvas's features are laid out as one picture, which is then cut, row by row, into runs as
    long as a tile. With more than one column such a run is a band of full-width rows and not the
    square tile. The released weights were trained with this (facts.md, trap 1).
    """
    if not columns:
        return features
    whole, cells = features[:1], features[1:]
    side = math.isqrt(cells.shape[1])
    canvas = cells.unflatten(0, (rows, columns)).unflatten(2, (side, side))
    runs = canvas.transpose(1, 2).reshape(cells.shape)  # [rows, side, columns, side, width]
    return torch.cat([whole, runs])


def padding_mask(tiles: Tiles, side: int) -> torch.Tensor:
    """Which features show the picture: bool [tiles, side**2], in the order of `regroup`.

    Computed in units of features with the original's truncations (facts.md, trap 2), so it does
    not agree to the pixel with `fit_canvas`.
    """
    count = tiles.pixels.shape[0]
    mask = torch.ones(count, side * side, dtype=torch.bool)
    if not tiles.columns:
        return mask
    width, height = tiles.picture_size
    canvas_width, canvas_height = tiles.columns * side, tiles.rows * side
    canvas = torch.zeros(canvas_height, canvas_width, dtype=torch.bool)
    if width / height > canvas_width / canvas_height:
        padding = (canvas_height - int(height * (canvas_width / width))) // 2
        canvas[padding : canvas_height - padding] = True
    else:
        padding = (canvas_width - int(width * (canvas_height / height))) // 2
        canvas[:, padding : canvas_width - padding] = True
    mask[1:] = canvas.view(count - 1, side * side)
    return mask


def _to_square(picture: Image.Image, config: TilingConfig, tile: int) -> Image.Image:
    if config.mode == "pad" and picture.width != picture.height:
        side = max(picture.size)
        mean = tuple(int(255 * value) for value in config.mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return picture.resize((tile, tile), Image.Resampling.BICUBIC)


def _stack(pictures: Sequence[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
