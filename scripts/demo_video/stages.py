"""The stages of the training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage; the learning rate falls from `rate` to `final_rate`.

    clips: of each step, of which `new_clips` are encoded in it and the others were before.
    questions: on each clip.
    labels: the weight of the loss of what the tokens tell about each frame, beside the answers'.
    empty: the share of the latents without any shape in their block that are not left out.
    """

    name: str
    steps: int
    rate: float
    final_rate: float
    frames: int = 8
    most_events: int = 3
    clips: int = 16
    new_clips: int = 5
    questions: int = 8
    labels: float = 1.0
    empty: float = 0.15


STAGES = (
    # Four frames take half the time of eight, which is enough to learn what the questions mean.
    Stage("short", 300, 1.5e-3, 1.5e-3, frames=4, most_events=2),
    Stage("full", 900, 1.5e-3, 4e-4, labels=0.5),
    Stage("finish", 150, 4e-4, 1e-5, labels=0.25, empty=1.0),
)
