"""The batch of each training step: images with labels, and packed questions on them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from scripts.demo_model.labelled_images import LabelledImage, render, render_page
from scripts.demo_model.packing import Rows, distinct, pack
from scripts.demo_model.pairs import (
    ask_difference,
    ask_pair,
    ask_same,
    sample_family,
    sample_pair,
)
from scripts.demo_model.questions import sample_questions
from scripts.demo_model.sampling import sample_scene
from scripts.demo_model.scene import Scene
from scripts.demo_model.stages import Stage
from scripts.demo_model.wordings import QA
from xgenmm.preprocessing.tokenizer import Tokenizer

# How often each kind is asked: kinds that are learnt late are asked more often.
QUESTION_WEIGHTS = {
    "caption": 1.0,
    "count": 5.0,
    "color": 1.0,
    "shape": 0.5,
    "existence": 2.0,
    "place": 4.0,
    "sign": 2.0,
}
PAGES = 4  # in each batch with questions, so that letters are not forgotten

Batch = tuple[list[LabelledImage], Rows | None]
Example = tuple[list[LabelledImage], list[QA]]


class Batches(Dataset[Batch]):
    """The batches of a stage. Each is a function of (seed, step), so that training can resume."""

    def __init__(
        self, stage: Stage, fonts: Sequence[Path], tokenizer: Tokenizer, seed: int
    ) -> None:
        self.stage, self.fonts, self.tokenizer, self.seed = stage, fonts, tokenizer, seed

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> Batch:
        stage = self.stage
        rng = random.Random(f"{self.seed} {stage.name} {step}")
        difficulty = step / (stage.easy * stage.steps) if stage.easy else 1.0
        pairs = rng.random() < stage.pairs
        if stage.families:
            examples = self._families(rng)
            return distinct(examples), pack(self.tokenizer, examples)
        examples = []
        for _ in range(stage.images // 2 if pairs else stage.images):
            # Some scenes are easy to the end, and at no time are all of them equally hard.
            level = min(1.0, difficulty) if rng.random() < 0.85 else rng.random()
            examples += [self._pair(rng, level)] if pairs else self._single(rng, level)
        images = distinct(examples)
        if not stage.asks:
            return images, None
        pages = [render_page(rng, self.fonts) for _ in range(PAGES)]
        return images + pages, pack(self.tokenizer, examples)

    def _pair(self, rng: random.Random, level: float) -> Example:
        """Two scenes, with questions that compare them and questions on each."""
        first, second, asked = sample_pair(
            rng,
            self.fonts,
            level,
            8,
            related=self.stage.related,
            wordings=self.stage.wordings,
        )
        asked += ask_each(rng, first, second, 4)
        return [render(first, rng), render(second, rng)], asked

    def _single(self, rng: random.Random, level: float) -> list[Example]:
        """One scene with its questions, or, in the stage `gather`, three pages of letters."""
        stage = self.stage
        if stage.name == "gather" and rng.random() < 0.5:
            return [([render_page(rng, self.fonts)], []) for _ in range(3)]
        # Words are the slowest to learn, so signs are more frequent than in the evaluation.
        sign = True if stage.name != "see" and rng.random() < 0.4 else None
        scene = sample_scene(rng, self.fonts, level=level, with_sign=sign)
        asked = sample_questions(scene, rng, 12, QUESTION_WEIGHTS) if stage.asks else []
        return [([render(scene, rng)], asked)]

    def _families(self, rng: random.Random) -> list[Example]:
        """Families of four images of two scenes that differ in one thing.

        Each family gives three pairs of the same scene, three of both scenes, and two single
        images.
        """
        families = []
        for _ in range(self.stage.images // 4):
            scenes = sample_family(rng, self.fonts, 1.0 if rng.random() < 0.85 else 0.5)
            families.append([[(scene, render(scene, rng)) for scene in sizes] for sizes in scenes])
        examples: list[Example] = []
        for family in families:
            for a, b in ((0, 0), (1, 1), (0, 0), (0, 1), (1, 0), (0, 1)):
                examples.append(self._family_pair(rng, family[a], family[b]))
            for sizes in family:
                scene, image = rng.choice(sizes)
                examples.append(([image], sample_questions(scene, rng, 12, QUESTION_WEIGHTS)))
        return examples

    def _family_pair(
        self,
        rng: random.Random,
        one: Sequence[tuple[Scene, LabelledImage]],
        other: Sequence[tuple[Scene, LabelledImage]],
    ) -> Example:
        """An image of each scene, with questions that compare them; `one` may be `other`."""
        (first, first_image), (second, second_image) = rng.choice(one), rng.choice(other)
        if one is other:
            asked = ask_same(rng, "yes", self.stage.wordings)
        else:
            asked = ask_pair(rng, first, second, 5, self.stage.wordings)
        asked += ask_difference(first, second)
        return [first_image, second_image], asked + ask_each(rng, first, second, 1)


def ask_each(rng: random.Random, first: Scene, second: Scene, n: int) -> list[QA]:
    """`n` questions on each of two images, which teach to tell the images apart."""
    return [
        replace(qa, question=f"In the {name} image: {qa.question}", kind="each")
        for name, scene in (("first", first), ("second", second))
        for qa in sample_questions(scene, rng, n, QUESTION_WEIGHTS)
    ]


def load_batches(batches: Batches, steps: range) -> Iterator[Batch]:
    """The batches of `steps`, made by a separate process."""
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=1,
            prefetch_factor=4,
        )
    )
