"""The batch of each training step: new clips, earlier ones, and packed questions on all of them."""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from scripts.demo_model.packing import Rows, pack
from scripts.demo_video.clip import Clip
from scripts.demo_video.frames import LabelledClip, labels, render
from scripts.demo_video.questions import sample_questions
from scripts.demo_video.sampling import sample_clip
from scripts.demo_video.stages import Stage
from xgenmm.preprocessing.tokenizer import Tokenizer

KEPT = 5000  # clips whose latents are kept; earlier ones are not asked about again


@dataclass(frozen=True)
class Batch:
    """A training step: `pixels` of the new clips by number, and all clips with their questions."""

    pixels: dict[int, NDArray[np.uint8]]
    clips: list[LabelledClip]
    rows: Rows


class Batches(Dataset[Batch]):
    """The batches of a stage, each a function of (seed, step).

    The tower is frozen, so a clip is encoded once and asked about several times, forwards and
    backwards.
    """

    def __init__(self, stage: Stage, tokenizer: Tokenizer, seed: int, start: int = 0) -> None:
        """start: the first step of this process; clips of earlier ones are not available."""
        self.stage, self.tokenizer, self.seed, self.start = stage, tokenizer, seed, start

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> Batch:
        stage = self.stage
        rng = random.Random(f"{self.seed} {stage.name} {step}")
        new = range(step * stage.new_clips, (step + 1) * stage.new_clips)
        earlier = range(max(self.start * stage.new_clips, new.stop - KEPT), new.start)
        again = rng.sample(earlier, min(len(earlier), stage.clips - stage.new_clips))
        examples = []
        for number in [*new, *again]:
            clip, backwards = self.clip(number), rng.random() < 0.5
            if backwards:
                clip = clip.reversed()
            shown = LabelledClip(number, backwards, labels(clip, stage.frames))
            examples.append(([shown], sample_questions(clip, rng, stage.questions)))
        pixels = {number: render(self.clip(number), stage.frames, rng) for number in new}
        return Batch(pixels, [shown[0] for shown, _ in examples], pack(self.tokenizer, examples))

    def clip(self, number: int) -> Clip:
        """The clip of this number."""
        rng = random.Random(f"{self.seed} {self.stage.name} clip {number}")
        return sample_clip(rng, self.stage.most_events)
