"""The questions that measure how good a checkpoint of the demo is."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from PIL import Image

from scripts.demo_model.drawing import draw
from scripts.demo_model.fonts import held_out_fonts
from scripts.demo_model.pairs import sample_pair
from scripts.demo_model.questions import questions
from scripts.demo_model.sampling import sample_scene
from scripts.demo_model.scene import Scene

EVALUATION_SEED = 20241115  # no seed of the training


@dataclass(frozen=True)
class Case:
    """One question of the evaluation set, on one scene or a pair."""

    scenes: tuple[Scene, ...]
    kind: str
    question: str
    answer: str

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The images of the question, drawn at each call."""
        return tuple(draw(scene) for scene in self.scenes)


def evaluation_set(seed: int, fonts: Sequence[Path], n: int = 500) -> list[Case]:
    """The evaluation set; equal seeds and fonts give equal sets.

    `n` scenes of level 1, three in five with a sign, each with one question of every kind that it
    allows and a second one on count, existence and place; then 3/5 n pairs with one or two
    questions each. With n = 500 every kind has at least 300 questions. Cases of one scene or pair
    are adjacent.
    """
    rng = random.Random(seed)
    cases: list[Case] = []
    for i in range(n):
        scene = sample_scene(rng, fonts, level=1.0, with_sign=i % 5 < 3)
        asked = questions(scene, rng) + questions(scene, rng, ("count", "existence", "place"))
        for qa in dict.fromkeys(asked):
            cases.append(Case((scene,), qa.kind, qa.question, qa.answer))
    for _ in range(n * 3 // 5):
        first, second, asked = sample_pair(rng, fonts, 1.0, n=2)
        cases += [Case((first, second), qa.kind, qa.question, qa.answer) for qa in asked]
    return cases


def evaluation_groups(n: int = 500) -> list[list[Case]]:
    """The cases of `evaluation_set` with the standard seed and fonts, by scene or pair."""
    cases = evaluation_set(EVALUATION_SEED, held_out_fonts(), n)
    return [list(group) for _, group in groupby(cases, key=lambda case: case.scenes)]
