"""What a stage measures, as lines of JSON, and the goals of docs/benchmarks.md."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
"""A line of the output: the machine, a figure, or how a stage ended."""


@dataclass(frozen=True)
class Figure:
    """One figure; `details` are other units of the same measurement, or what it consists of."""

    measured: str
    value: float
    unit: str
    details: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> Record:
        """This figure as a line of the output, without its stage."""
        details = {name: _rounded(value) for name, value in self.details.items()}
        value = _rounded(self.value)
        return {"measured": self.measured, "value": value, "unit": self.unit, "details": details}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


class Skipped(Exception):  # noqa: N818 - not an error
    """A stage cannot run here; the message says why."""


@dataclass(frozen=True)
class Goal:
    """The least or the most that a figure should be."""

    unit: str
    at_least: float | None = None
    at_most: float | None = None


GOALS: Mapping[tuple[str, str], Goal] = {
    ("self_check", "duration"): Goal("s", at_most=0.5),
    ("decode", "batch 1: of the copy bandwidth"): Goal("%", at_least=88),
    ("decode", "batch 32: of the copy bandwidth"): Goal("%", at_least=70),
    ("vision", "tower and resampler, 5 tiles: of a matrix product"): Goal("%", at_least=50),
    ("engine", "first token, 5 tiles, from JPEG bytes"): Goal("ms", at_most=40),
    ("engine", "second question on the image"): Goal("ms", at_most=10),
    ("engine", "one-word answer, from JPEG bytes"): Goal("ms", at_most=50),
    ("loading", "plain weights: peak of device memory, one stream"): Goal("GB", at_most=11),
    ("loading", "int8 weights: peak of device memory, one stream"): Goal("GB", at_most=7),
    ("loading", "int8 weights: decode against plain"): Goal("x", at_least=1.6),
    ("loading", "fp8 weights: decode against plain"): Goal("x", at_least=1.6),
    ("server", "process start to READY"): Goal("s", at_most=12),
    ("server", "of that setup()"): Goal("s", at_most=5),
    ("transformers", "float32: one word against ours"): Goal("x", at_least=15),
}
"""By stage and figure."""
