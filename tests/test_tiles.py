"""Pictures to tiles, the regrouping and the mask, on cases one can follow by hand."""

import pytest
import torch
from PIL import Image

from xgenmm.config import GRIDS_384, TilingConfig
from xgenmm.tiles import (
    Tiles,
    best_canvas,
    fit_canvas,
    normalise,
    padding_mask,
    regroup,
    tile_picture,
)

SMALL = TilingConfig(grids=((4, 8), (8, 4), (8, 8), (12, 4), (4, 12)))


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((1000, 1000), (768, 768)),
        ((4000, 1000), (1152, 384)),
        ((100, 3000), (384, 1152)),
        ((384, 384), (384, 768)),  # both two-tile canvases keep all; the first in the list wins
        ((1, 1), (384, 768)),
        ((700, 380), (768, 384)),
    ],
)
def test_best_canvas(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert best_canvas(size, GRIDS_384) == canvas


def test_picture_is_centred_on_black() -> None:
    canvas = fit_canvas(Image.new("RGB", (100, 20), "white"), (12, 4))
    rows = [canvas.getpixel((6, y)) for y in range(4)]
    assert rows == [(255, 255, 255)] * 3 + [(0, 0, 0)]  # 12 x ceil(2.4), (4 - 3) // 2 above it


def test_whole_picture_comes_first_then_the_canvas_row_by_row() -> None:
    picture = Image.new("RGB", (8, 8))
    for place, color in (((0, 0), 10), ((4, 0), 20), ((0, 4), 30), ((4, 4), 40)):
        picture.paste((color, color, color), (*place, place[0] + 4, place[1] + 4))
    tiles = tile_picture(picture, SMALL, 4)
    assert (tiles.columns, tiles.rows, tiles.picture_size) == (2, 2, (8, 8))
    assert tiles.pixels.shape == (5, 4, 4, 3)
    assert tiles.pixels.dtype == torch.uint8
    assert [int(tile[2, 2, 0]) for tile in tiles.pixels[1:]] == [10, 20, 30, 40]


def test_squash_and_pad_make_one_tile() -> None:
    picture = Image.new("RGB", (80, 20), "white")
    squashed = tile_picture(picture, TilingConfig("squash", ()), 8)
    padded = tile_picture(picture, TilingConfig("pad", ()), 8)
    assert squashed.pixels.shape == padded.pixels.shape == (1, 8, 8, 3)
    assert squashed.pixels.min() == 255
    assert int(padded.pixels[0, 0, 0, 0]) == 127  # the mean colour


def test_normalise() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(-1, -1, -1, 3)
    values = normalise(pixels, TilingConfig(), torch.float32)
    assert values.shape == (1, 3, 1, 2)
    assert values.unique().tolist() == [-1.0, 1.0]


def test_runs_are_bands_of_full_width_rows() -> None:
    # 2 x 1 tiles of 2 x 2 features, each named by its row and column on the canvas.
    left = [[0, 0], [0, 1], [1, 0], [1, 1]]
    right = [[0, 2], [0, 3], [1, 2], [1, 3]]
    whole = [[9, 9]] * 4
    features = torch.tensor([whole, left, right])
    found = regroup(features, columns=2, rows=1).tolist()
    assert found[0] == whole
    assert found[1] == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert found[2] == [[1, 0], [1, 1], [1, 2], [1, 3]]


def test_one_column_stays_as_it_is() -> None:
    features = torch.arange(4 * 9 * 2).view(4, 9, 2)
    assert torch.equal(regroup(features, columns=1, rows=3), features)


def test_mask_marks_the_padding_of_the_canvas_only() -> None:
    tiles = Tiles(torch.zeros(4, 6, 6, 3, dtype=torch.uint8), 3, 1, (300, 20))
    mask = padding_mask(tiles, side=3)
    assert mask.shape == (4, 9)
    assert mask[0].all()
    # 9 x 3 features; the picture is int(20 * 9 / 300) = 0 features high, so (3 - 0) // 2 = 1 row
    # is padding above and below.
    assert mask[1:].flatten().tolist() == [False] * 9 + [True] * 9 + [False] * 9
