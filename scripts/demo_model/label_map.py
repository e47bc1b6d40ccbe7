"""Dense labels: the class of what a scene shows in each cell of a grid.

Classes are 0 for the background, one for each pair of kind and colour, one for each letter, and one
for the empty part of a sign.
"""

import numpy as np
from numpy.typing import NDArray

from scripts.demo_model.scene import COLORS, KINDS, LETTERS, Box, Scene, Shape
from scripts.demo_model.shapes import corners

FIRST_LETTER_CLASS = 1 + len(KINDS) * len(COLORS)
SIGN_CLASS = FIRST_LETTER_CLASS + len(LETTERS)
NUM_CLASSES = SIGN_CLASS + 1


def shape_class(shape: Shape) -> int:
    """The class of a shape's kind and colour."""
    return 1 + KINDS.index(shape.kind) * len(COLORS) + COLORS.index(shape.color)


def letter_class(letter: str) -> int:
    """The class of a letter of a sign."""
    return FIRST_LETTER_CLASS + LETTERS.index(letter)


def label_map(
    scene: Scene, rows: int, cols: int, box: Box | None = None, *, oversample: int = 4
) -> NDArray[np.int64]:
    """The class of each cell of a grid over the image, int64 [rows, cols].

    A cell gets the class that covers most of it, ignoring the background, if that class covers at
    least a quarter of the cell (so that thin parts count). Coverage is estimated from
    `oversample` squared points.

    Args:
        box: the region that the grid divides, in pixels of the image; by default the whole image.
            The part outside the image is background.
    """
    x0, y0, x1, y1 = (0, 0, scene.width, scene.height) if box is None else box
    xs = x0 + (np.arange(cols * oversample) + 0.5) * (x1 - x0) / (cols * oversample)
    ys = y0 + (np.arange(rows * oversample) + 0.5) * (y1 - y0) / (rows * oversample)
    classes = np.zeros((len(ys), len(xs)), dtype=np.int64)

    def fill(filled: Box, label: int, polygon: NDArray[np.float64] | None = None) -> None:
        left, right = np.searchsorted(xs, (filled[0], filled[2]))
        top, bottom = np.searchsorted(ys, (filled[1], filled[3]))
        part = classes[top:bottom, left:right]
        part[... if polygon is None else _inside(polygon, xs[left:right], ys[top:bottom])] = label

    for shape in scene.shapes:
        fill(shape.box, shape_class(shape), corners(shape))
    if scene.sign is not None:
        fill(scene.sign.box, SIGN_CLASS)
        for letter, letter_box in zip(scene.sign.word, scene.sign.letters, strict=True):
            fill(letter_box, letter_class(letter))
    by_cell = classes.reshape(rows, oversample, cols, oversample).transpose(0, 2, 1, 3)
    points = by_cell.reshape(rows, cols, oversample**2)
    present = np.array([c for c in np.unique(classes) if c], dtype=np.int64)
    if not present.size:
        return np.zeros((rows, cols), dtype=np.int64)
    counts = (points[..., None] == present).sum(axis=2)
    best = counts.argmax(axis=2)
    covered = 4 * counts.max(axis=2) >= oversample**2
    return np.where(covered, present[best], 0)


def _inside(
    polygon: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which points of the grid xs by ys lie in the polygon [points, 2]; bool [ys, xs].

    A point is inside if a ray to its right crosses an odd number of edges.
    """
    ax, ay = polygon.T
    bx, by = np.roll(polygon, -1, axis=0).T
    crosses = (ay > ys[:, None]) != (by > ys[:, None])  # [ys, edges]
    # Horizontal edges cross no ray; avoid dividing by their zero height.
    height = np.where(by == ay, 1.0, by - ay)
    crossing_x = ax + (ys[:, None] - ay) * (bx - ax) / height
    hits = crosses[:, None] & (xs[:, None] < crossing_x[:, None])  # [ys, xs, edges]
    odd: NDArray[np.bool_] = np.logical_xor.reduce(hits, axis=2)
    return odd
