"""Fonts and scenes for the tests of the demo's world."""

import random
from pathlib import Path

import matplotlib
import pytest

from scripts.demo_model.fonts import find_fonts, split_fonts
from scripts.demo_model.sampling import sample_scene
from scripts.demo_model.scene import Scene


@pytest.fixture(scope="session")
def fonts() -> list[Path]:
    """The training fonts among those of matplotlib."""
    found = find_fonts([Path(matplotlib.get_data_path()) / "fonts" / "ttf"])
    return split_fonts(found)[0]


@pytest.fixture(scope="session")
def scenes(fonts: list[Path]) -> list[Scene]:
    """Scenes of all levels."""
    rng = random.Random(11)
    return [sample_scene(rng, fonts, level=i % 5 / 4) for i in range(400)]
