"""A golden case and how far what was computed here is from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

TOLERANCES: Mapping[str, float] = {
    "tiles": 1e-6,
    "mask": 0.0,
    "features": 1e-4,
    "latents": 1e-4,
    "temporal": 1e-4,
    "vision_tokens": 1e-4,
    "inputs_embeds": 1e-4,
    "logits": 1e-3,
    "ids": 0.0,  # number of positions that differ
}


@dataclass
class Case:
    """A golden case and the largest difference of each stage from what was computed here.

    tolerances: by stage; one that ends in `_pad` or `_squash` has that of the rest of its name, one
        that ends in `ids` that of `ids`.
    """

    name: str
    differences: dict[str, float] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=lambda: TOLERANCES)

    @property
    def passed(self) -> bool:
        """Whether anything was compared and every stage is within its tolerance."""
        within = (
            value <= self.tolerances[_kind(stage)] for stage, value in self.differences.items()
        )
        return bool(self.differences) and all(within)

    def record(self, stage: str, difference: float) -> None:
        """Record a difference if it is the largest of its stage; NaN counts as infinite."""
        difference = float("inf") if math.isnan(difference) else difference
        self.differences[stage] = max(difference, self.differences.get(stage, 0.0))

    def compare(self, stage: str, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Record the largest difference; infinite if shapes differ or a value is NaN."""
        largest = float("inf")
        if expected.shape == found.shape:
            differences = (expected.float() - found.float()).abs()
            largest = differences.max().item() if differences.numel() else 0.0
        self.record(stage, largest)

    def compare_ids(self, stage: str, expected: Sequence[int], found: Sequence[int]) -> None:
        """Record how many positions differ, missing ones included."""
        pairs = zip(expected, found, strict=False)
        count = sum(a != b for a, b in pairs) + abs(len(expected) - len(found))
        self.record(stage, float(count))

    def __str__(self) -> str:
        parts = [
            f"{stage} {value:.0f} differ" if _kind(stage) == "ids" else f"{stage} {value:.1e}"
            for stage, value in self.differences.items()
        ]
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {', '.join(parts) or 'nothing'}"


def _kind(stage: str) -> str:
    return "ids" if stage.endswith("ids") else stage.removesuffix("_pad").removesuffix("_squash")
