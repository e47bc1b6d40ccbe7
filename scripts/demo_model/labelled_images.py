"""Training images: a scene's tiles as the model gets them, and labels of what they show."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.demo_model.checkpoint import CONFIG, SIDE, TILE
from scripts.demo_model.drawing import draw, draw_page
from scripts.demo_model.label_map import (
    NUM_CLASSES,
    SIGN_CLASS,
    label_map,
    letter_class,
    shape_class,
)
from scripts.demo_model.sampling import sample_page
from scripts.demo_model.scene import Box, Scene
from xgenmm.config import TilingConfig
from xgenmm.preprocessing.tiling import TiledImage, tile_image

COVER_CLASSES = NUM_CLASSES  # what covers a cell; 0 is background
CENTER_CLASSES = SIGN_CLASS  # a shape or letter whose centre is in a cell; 0 is none


@dataclass(frozen=True)
class LabelledImage:
    """A scene as the model gets it, and what each cell of its tiles shows.

    cover, center: int64 [tiles, SIDE, SIDE], with `COVER_CLASSES` and `CENTER_CLASSES` classes.
    """

    tiles: TiledImage
    cover: torch.Tensor
    center: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """How many vision tokens the image has."""
        return self.tiles.pixels.shape[0] * CONFIG.resampler.num_latents


def render(scene: Scene, rng: random.Random) -> LabelledImage:
    """Draw the scene, three times in ten with JPEG artefacts, and label its cells."""
    image = draw(scene)
    if rng.random() < 0.3:
        file = BytesIO()
        image.save(file, "JPEG", quality=rng.randint(70, 95))
        image = Image.open(file).convert("RGB")
    tiles = tile_image(image, CONFIG.tiling, TILE)
    columns, rows = tiles.columns, tiles.rows
    whole = (0.0, 0.0, float(scene.width), float(scene.height))
    scale = min(columns * TILE / scene.width, rows * TILE / scene.height)
    left = (columns * TILE / scale - scene.width) / 2
    top = (rows * TILE / scale - scene.height) / 2
    canvas = (-left, -top, scene.width + left, scene.height + top)
    parts = [
        tile_labels(scene, 1, 1, whole),
        tile_labels(scene, columns, rows, canvas),
    ]
    cover, center = (torch.from_numpy(np.concatenate(maps)) for maps in zip(*parts, strict=True))
    return LabelledImage(tiles, cover, center)


def render_page(rng: random.Random, fonts: Sequence[Path]) -> LabelledImage:
    """Draw a page of signs as one tile."""
    scenes = sample_page(rng, fonts)
    image = draw_page(scenes)
    tile = tile_image(image, TilingConfig("squash", ()), TILE)
    box = (0.0, 0.0, float(image.width), float(image.height))
    maps = [np.stack(tile_labels(scene, 1, 1, box)) for scene in scenes]
    cover, center = (torch.from_numpy(merged) for merged in np.max(maps, axis=0))
    return LabelledImage(tile, cover, center)


def tile_labels(
    scene: Scene, columns: int, rows: int, box: Box
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Cover and centre classes of the tiles that divide `box`, each [tiles, SIDE, SIDE]."""
    height, width = rows * SIDE, columns * SIDE
    cover = label_map(scene, height, width, box)
    center = np.zeros_like(cover)
    things = [(shape.box, shape_class(shape)) for shape in scene.shapes]
    if scene.sign is not None:
        letters = zip(scene.sign.letters, scene.sign.word, strict=True)
        things += [(letter_box, letter_class(letter)) for letter_box, letter in letters]
    for (x0, y0, x1, y1), label in things:
        x = int(((x0 + x1) / 2 - box[0]) / (box[2] - box[0]) * width)
        y = int(((y0 + y1) / 2 - box[1]) / (box[3] - box[1]) * height)
        center[min(y, height - 1), min(x, width - 1)] = label

    def cut(cells: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        tiles = cells.reshape(rows, SIDE, columns, SIDE).transpose(0, 2, 1, 3)
        return tiles.reshape(-1, SIDE, SIDE)

    return cut(cover), cut(center)


def band_labels(cells: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """What each feature that the resampler gets may show: int64 [tiles, SIDE**2, 3], 0 for nothing.

    Regrouping turns tiles into bands of full-width rows. The resampler can tell a feature's row of
    the canvas and its place within its own tile, but not its column of tiles. So the label is the
    set of what all columns show there.

    cells: int64 [tiles, SIDE, SIDE].
    """
    sets = cells.new_zeros(cells.shape[0], SIDE * SIDE, 3)
    sets[0, :, 0] = cells[0].flatten()
    grid = cells[1:].view(rows, columns, SIDE, SIDE).permute(0, 2, 3, 1)
    grid = grid[:, :, None].expand(-1, -1, columns, -1, -1)
    sets[1:, :, :columns] = grid.reshape(rows * columns, SIDE * SIDE, columns)
    return sets


def label_sets(image: LabelledImage) -> torch.Tensor:
    """`band_labels` of cover and centre: int64 [2, tiles, SIDE**2, 3]."""
    columns, rows = image.tiles.columns, image.tiles.rows
    return torch.stack([band_labels(cells, columns, rows) for cells in (image.cover, image.center)])
