"""The data set that teaches the demo Italian: 500 images, with answers in Italian and English.

Those in English are of all kinds that the demo knows, to keep what it knows.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.demo_finetune.italian import italian_questions
from scripts.demo_model.drawing import draw
from scripts.demo_model.fonts import training_fonts
from scripts.demo_model.pairs import sample_pair
from scripts.demo_model.questions import sample_questions
from scripts.demo_model.sampling import sample_scene
from scripts.demo_model.scene import Scene
from scripts.demo_model.wordings import QA

DATA_SEED = "italian"
ENGLISH = {
    "caption": 2.0,
    "count": 1.5,
    "color": 0.5,
    "shape": 0.5,
    "existence": 1.0,
    "place": 2.0,
    "sign": 2.5,
}
"""How often each kind of question is asked in English; those more that are forgotten sooner."""


@dataclass(frozen=True)
class Mix:
    """How many images of each sort a data set has, and questions on each.

    Attributes:
        pairs: of two images each, in English only.
        italian, english: questions on an image or a pair, at most.
    """

    images: int = 420
    pairs: int = 40
    italian: int = 4
    english: int = 4


def write_dataset(folder: Path, mix: Mix | None = None) -> None:
    """Write the images and `data.jsonl` into a folder, the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    number, lines = 0, []
    for scenes, asked in _sample(mix or Mix()):
        names = []
        for scene in scenes:
            names.append(f"{number:03}.png")
            draw(scene).save(folder / names[-1])
            number += 1
        lines += [json.dumps(_record(qa, names), ensure_ascii=False) + "\n" for qa in asked]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")


def _sample(mix: Mix) -> Iterator[tuple[tuple[Scene, ...], Sequence[QA]]]:
    """Sample one or two scenes at a time, and different questions on them."""
    rng = random.Random(DATA_SEED)
    fonts = training_fonts(system=False)  # those that the development requirements pin
    for _ in range(mix.images):
        scene = sample_scene(rng, fonts, level=1.0)
        asked = italian_questions(scene, rng, mix.italian)
        yield (scene,), asked + sample_questions(scene, rng, mix.english, ENGLISH)
    for _ in range(mix.pairs):
        first, second, asked = sample_pair(rng, fonts, 1.0, mix.english)
        yield (first, second), asked


def _record(qa: QA, images: Sequence[str]) -> dict[str, Any]:
    """A sample of its own for each question: the demo has never seen a second turn."""
    messages = [
        {"role": "user", "content": qa.question},
        {"role": "assistant", "content": qa.answer},
    ]
    return {"messages": messages, "images": images}
