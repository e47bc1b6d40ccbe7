"""Preparation of tiles for the vision tower, and of its features for the resampler.

Pure functions of tensors and of the canvas grid, columns x rows tiles (0 x 0 if there is only the
base tile). They follow the original `Blip3ImageProcessor` and its use in
`XGenMMModelForConditionalGeneration`, including two quirks that the released weights were trained
with: see `regroup` and `padding_mask`.
"""

import math

import torch

from xgenmm.config import Size, TilingConfig
from xgenmm.models.transfer import to_device


def normalize(pixels: torch.Tensor, config: TilingConfig, dtype: torch.dtype) -> torch.Tensor:
    """Scale pixels to [0, 1] and normalize them by mean and standard deviation.

    uint8 [tiles, tile_size, tile_size, 3] -> `dtype` [tiles, 3, tile_size, tile_size], on the
    device of the pixels.
    """
    mean = to_device(torch.tensor(config.mean), pixels.device)
    std = to_device(torch.tensor(config.std), pixels.device)
    values = (pixels.to(torch.float32) / 255 - mean) / std
    return values.permute(0, 3, 1, 2).to(dtype)


def regroup(features: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """Regroup the features of the canvas into runs of full-width rows.

    The original lays the features of all tiles out as one canvas, [rows * side, columns * side],
    and cuts it, read row by row, into runs of side**2 features. With more than one column, a
    "tile" of the resampler is therefore a band across the canvas, not a square tile. The released
    weights were trained this way. The base tile is unaffected.

    features: [1 + rows * columns, side**2, width], base tile first. Returns the same shape.
    """
    if not columns:
        return features
    base, tiles = features[:1], features[1:]
    side = math.isqrt(tiles.shape[1])
    canvas = tiles.unflatten(0, (rows, columns)).unflatten(2, (side, side))
    bands = canvas.transpose(1, 2).reshape(tiles.shape)  # from [rows, side, columns, side, width]
    return torch.cat([base, bands])


def padding_mask(columns: int, rows: int, image_size: Size, side: int) -> torch.Tensor:
    """Mark the features that show the image rather than padding, in the order of `regroup`.

    As in the original, the padding is computed in units of features and with truncation
    (`int(height * scale)`, `(canvas - size) // 2`), so it differs slightly from the pixels that
    `resize_and_pad` leaves black. The base tile has no padding.

    image_size: (width, height) of the original image. side: features along one side of a tile.

    Returns bool [1 + rows * columns, side**2].
    """
    mask = torch.ones(1 + columns * rows, side * side, dtype=torch.bool)
    if not columns:
        return mask
    width, height = image_size
    canvas_width, canvas_height = columns * side, rows * side
    canvas = torch.zeros(canvas_height, canvas_width, dtype=torch.bool)
    if width / height > canvas_width / canvas_height:
        padding = (canvas_height - int(height * (canvas_width / width))) // 2
        canvas[padding : canvas_height - padding] = True
    else:
        padding = (canvas_width - int(width * (canvas_height / height))) // 2
        canvas[:, padding : canvas_width - padding] = True
    mask[1:] = canvas.view(-1, side * side)
    return mask
