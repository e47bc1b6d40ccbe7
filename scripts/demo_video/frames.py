"""Clips as the model gets them, and labels of what each latent should know about each frame."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scripts.demo_model.checkpoint import SIDE, TILE
from scripts.demo_model.drawing import draw
from scripts.demo_model.label_map import FIRST_LETTER_CLASS, label_map, shape_class
from scripts.demo_model.scene import Scene
from scripts.demo_video.checkpoint import CONFIG
from scripts.demo_video.clip import Clip
from xgenmm.preprocessing.tiling import tile_image

GRID = SIDE // 2  # the image demo's latents describe blocks of 2 x 2 cells, row by row
NUM_CLASSES = FIRST_LETTER_CLASS  # kinds and colors of shapes; 0 is none


@dataclass(frozen=True)
class LabelledClip:
    """What a row of questions shows.

    number: of the clip in the training. backwards: whether its frames are in reversed order.
    labels: int64 [2, frames, latents]; the shape that covers a latent's block, and that whose
        center is in it.
    """

    number: int
    backwards: bool
    labels: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """How many vision tokens the clip has."""
        return CONFIG.clip_tokens


def render(clip: Clip, count: int, rng: random.Random) -> NDArray[np.uint8]:
    """Draw `count` frames, in three of ten clips with JPEG artefacts.

    Returns tiles, uint8 [count, TILE, TILE, 3].
    """
    images = [draw(scene) for scene in clip.scenes(count)]
    if rng.random() < 0.3:
        quality = rng.randint(60, 95)
        images = [_recompress(image, quality) for image in images]
    return tiles(images)


def tiles(images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """Frames as the model gets them: uint8 [frames, TILE, TILE, 3]."""
    return np.concatenate([tile_image(image, CONFIG.tiling, TILE).pixels for image in images])


def labels(clip: Clip, count: int) -> torch.Tensor:
    """The labels of `LabelledClip`."""
    return torch.from_numpy(
        np.stack([_frame_labels(scene) for scene in clip.scenes(count)], axis=1)
    )


def _frame_labels(scene: Scene) -> NDArray[np.int64]:
    side = max(scene.width, scene.height)
    left, top = (scene.width - side) / 2, (scene.height - side) / 2
    cover = label_map(scene, GRID, GRID, (left, top, left + side, top + side), oversample=6)
    center: NDArray[Any] = np.zeros_like(cover)
    for shape in scene.shapes:
        x = int(((shape.box[0] + shape.box[2]) / 2 - left) / side * GRID)
        y = int(((shape.box[1] + shape.box[3]) / 2 - top) / side * GRID)
        center[y, x] = shape_class(shape)
    return np.stack([cover.ravel(), center.ravel()])


def _recompress(image: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")
