"""The stages of the training, from direct supervision to the task itself.

see       the vision tower learns what stands in each of its cells (shape and colour, or letter) and
          the cell's place
gather    the resampler learns to pass that on: each latent describes its own block of cells; pages
          full of letters join the scenes
answer    resampler and decoder learn to answer; the tower is frozen, which saves a third of the
          time
polish    everything together, at a falling learning rate
finish    the same, mostly on two images, with questions on either of them
compare   the same, mostly on two images that are the same or nearly so
match     the decoder alone, on many pairs of few images; it is also asked what one of them shows
          and the other does not, which teaches more than a bare yes or no
rematch   the same once more, starting from a higher rate again
settle    the same a last time, from a lower rate
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage: `steps` of `images` each; the learning rate falls from `rate` to `final_rate`."""

    name: str
    steps: int
    images: int
    rate: float
    final_rate: float
    easy: float  # the share of the stage over which the difficulty of scenes rises to the full
    asks: bool = False  # questions
    pairs: float = 0.0  # the share of steps that ask about two images
    related: float = 0.5  # the share of these pairs that are the same or nearly so
    families: bool = False  # images come in fours, of which many pairs are made
    wordings: int = 1  # of the question whether a pair is the same


STAGES = (
    Stage("see", 700, 24, 1.2e-3, 8e-4, 0.3),
    Stage("gather", 700, 16, 1e-3, 6e-4, 0.0),
    Stage("answer", 700, 16, 1e-3, 1e-3, 0.4, asks=True, pairs=0.5),
    Stage("polish", 1800, 16, 1.4e-3, 2e-4, 0.0, asks=True, pairs=0.5),
    Stage("finish", 1900, 16, 7e-4, 1e-5, 0.0, asks=True, pairs=0.6),
    Stage("compare", 550, 16, 5e-4, 1e-5, 0.0, asks=True, pairs=0.75, related=0.75, wordings=4),
    Stage("match", 700, 16, 8e-4, 1e-5, 0.0, asks=True, families=True, wordings=2),
    Stage("rematch", 300, 16, 7e-4, 1e-5, 0.0, asks=True, families=True, wordings=2),
    Stage("settle", 120, 16, 4e-4, 1e-5, 0.0, asks=True, families=True, wordings=2),
)

_ALL = {"tower": 0.2, "resampler": 0.3, "answer": 1.0}
_DECODER = {"answer": 1.0}
LOSS_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "see": {"tower": 1.0},
    "gather": {"tower": 0.5, "resampler": 1.0},
    "answer": {"resampler": 0.2, "answer": 1.0},
    "polish": _ALL,
    "finish": _ALL,
    "compare": _ALL,
    "match": _DECODER,
    "rematch": _DECODER,
    "settle": _DECODER,
}
"""The weight of each loss by stage. A part of the model whose loss is not listed is frozen."""
