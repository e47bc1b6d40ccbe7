"""What a scene of the demo's world consists of: shapes, a sign, a background.

A scene has 1 to 4 shapes that do not overlap, on a plain light background, and sometimes a sign: a
white box with one upper-case word. Lengths are pixels of the image, x to the right and y down; a
box is (x0, y0, x1, y1). Pixel (column i, row j) covers the square from (i, j) to (i + 1, j + 1).
"""

from dataclasses import dataclass
from pathlib import Path

Box = tuple[float, float, float, float]
Rgb = tuple[int, int, int]

KINDS = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "yellow", "black", "purple", "orange")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

MIN_SIDE, MAX_SIDE = 64, 640  # of an image
MAX_ASPECT = 3.0
MIN_SHAPE, MAX_SHAPE = 1 / 8, 0.45  # of an image's shorter side


@dataclass(frozen=True)
class Shape:
    """One shape. `box` is its tight bounding box after rotation by `angle`."""

    kind: str
    color: str
    box: Box
    angle: float  # degrees, anticlockwise
    shade: Rgb  # the colour drawn, one of many called `color`

    @property
    def name(self) -> str:
        """Colour and kind as in an answer: `red star`."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Sign:
    """A white box with one word. `letters` are the tight boxes of its letters, in order."""

    word: str
    box: Box
    letters: tuple[Box, ...]
    font: Path
    font_size: int
    ink: Rgb


@dataclass(frozen=True)
class Scene:
    """Everything an image shows. `shapes` are in the order in which they were placed."""

    width: int
    height: int
    background: Rgb
    shapes: tuple[Shape, ...]
    sign: Sign | None

    @property
    def short(self) -> int:
        """The shorter side in pixels, the unit of sizes and margins."""
        return min(self.width, self.height)


def bounds(boxes: tuple[Box, ...] | list[Box]) -> Box:
    """The smallest box that contains all `boxes`."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)
