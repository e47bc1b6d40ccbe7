"""Questions whose answers are wanted in Italian, which the demo does not know.

Answers are in capitals: the demo has learned to write letters from signs only, and the rows of its
output layer for small letters were never a target, so that LoRA cannot tell them apart.
"""

import random
from collections.abc import Mapping
from dataclasses import replace

from scripts.demo_model.questions import sample_questions
from scripts.demo_model.scene import Scene
from scripts.demo_model.wordings import QA

IN_ITALIAN = "{} Answer in Italian."
KINDS: Mapping[str, float] = {"color": 1.0, "shape": 1.0}
"""Of questions, with weights."""

ITALIAN: Mapping[str, str] = {
    "circle": "CERCHIO",
    "square": "QUADRATO",
    "triangle": "TRIANGOLO",
    "star": "STELLA",
    "red": "ROSSO",
    "green": "VERDE",
    "blue": "BLU",
    "yellow": "GIALLO",
    "black": "NERO",
    "purple": "VIOLA",
    "orange": "ARANCIONE",
}


def italian_questions(scene: Scene, rng: random.Random, n: int) -> list[QA]:
    """Sample at most `n` different questions on a scene."""
    return [
        replace(qa, question=IN_ITALIAN.format(qa.question), answer=ITALIAN[qa.answer])
        for qa in sample_questions(scene, rng, n, KINDS)
    ]
