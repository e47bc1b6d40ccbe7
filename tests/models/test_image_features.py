"""Normalisation, regrouping and padding masks, on examples small enough to check by hand."""

import torch

from xgenmm.config import TilingConfig
from xgenmm.models.image_features import normalize, padding_mask, regroup


def test_normalize_maps_pixels_to_minus_one_and_one() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(-1, -1, -1, 3)
    values = normalize(pixels, TilingConfig(), torch.float32)
    assert values.shape == (1, 3, 1, 2)
    assert values.unique().tolist() == [-1.0, 1.0]


def test_regroup_gives_bands_of_full_width_rows() -> None:
    # 2 x 1 tiles of 2 x 2 features, each labelled with its row and column on the canvas.
    left = [[0, 0], [0, 1], [1, 0], [1, 1]]
    right = [[0, 2], [0, 3], [1, 2], [1, 3]]
    base = [[9, 9]] * 4
    features = torch.tensor([base, left, right])
    found = regroup(features, columns=2, rows=1).tolist()
    assert found[0] == base
    assert found[1] == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert found[2] == [[1, 0], [1, 1], [1, 2], [1, 3]]


def test_regroup_leaves_a_single_column_unchanged() -> None:
    features = torch.arange(4 * 9 * 2).view(4, 9, 2)
    assert torch.equal(regroup(features, columns=1, rows=3), features)


def test_padding_mask_covers_the_canvas_but_not_the_base_tile() -> None:
    mask = padding_mask(3, 1, (300, 20), side=3)
    assert mask.shape == (4, 9)
    assert mask[0].all()
    # The canvas has 9 x 3 features. The image is int(20 * 9 / 300) = 0 features high, so
    # (3 - 0) // 2 = 1 row above and below it is padding.
    assert mask[1:].flatten().tolist() == [False] * 9 + [True] * 9 + [False] * 9
