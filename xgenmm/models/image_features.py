"""Tiles as the tower gets them, and their features as the sampler does: regrouped and masked.

Pure functions of tensors and of the canvas, whose grid of tiles is columns x rows (0 x 0 if there
is only the whole image). Follows the original `Blip3ImageProcessor` and
its use in `XGenMMModelForConditionalGeneration`.
"""

import math

import torch

from xgenmm.config import Size, TilingConfig


def normalize(pixels: torch.Tensor, config: TilingConfig, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [tiles, tile, tile, 3] -> `dtype` [tiles, 3, tile, tile], on the pixels' own device."""
    mean = torch.tensor(config.mean, device=pixels.device)
    std = torch.tensor(config.std, device=pixels.device)
    values = (pixels.to(torch.float32) / 255 - mean) / std
    return values.permute(0, 3, 1, 2).to(dtype)


def regroup(features: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """Features of the tiles as the sampler gets them: [1 + rows * columns, side**2, width].

    The canvas's features are laid out as one image, which is then cut, row by row, into runs as
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


def padding_mask(columns: int, rows: int, image_size: Size, side: int) -> torch.Tensor:
    """Which features show the image: bool [tiles, side**2], in the order of `regroup`.

    Computed in units of features with the original's truncations (facts.md, trap 2), so it does
    not agree to the pixel with `resize_and_pad`.
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
