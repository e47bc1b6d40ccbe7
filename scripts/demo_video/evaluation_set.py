"""The clips and questions that measure how good a checkpoint is."""

import random

from scripts.demo_model.wordings import QA
from scripts.demo_video.clip import Clip
from scripts.demo_video.questions import questions
from scripts.demo_video.sampling import sample_clip

VALIDATION_SEED, EVALUATION_SEED = 20251101, 20251126  # no seeds of the training


def evaluation_set(seed: int, n: int) -> list[tuple[Clip, list[QA]]]:
    """`n` clips with a question of each kind that they allow; equal seeds give equal sets."""
    rng = random.Random(seed)
    clips = (sample_clip(rng) for _ in range(n))
    return [(clip, questions(clip, rng)) for clip in clips]
