"""What a part measures, as rows of a Markdown table, and the machine it was measured on."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

HEAD = "| part | measured | figure | goal | met |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Options:
    """What parts read of the program's options, which `--help` describes."""

    requests: int | None = None
    scenes: int = 500
    golden: Path | None = None
    tiny: bool = False
    images: int = 2000
    single: int = 400
    model: str = "demo"
    actors: int = 2
    rounds: int = 3
    vllm: Path = Path(".venv-vllm/bin/python")


@dataclass(frozen=True)
class Row:
    """One figure, None if it was not measured, and its goal if it has one."""

    part: str
    measured: str
    value: float | None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or without a figure."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high

    def __str__(self) -> str:
        goal = ""
        if self.at_least is not None:
            goal = f"≥ {format_figure(self.at_least, self.unit)}"
        elif self.at_most is not None:
            goal = f"≤ {format_figure(self.at_most, self.unit)}"
        met = {True: "yes", False: "**no**", None: ""}[self.met]
        cells = (self.part, self.measured, format_figure(self.value, self.unit), goal, met)
        return f"| {' | '.join(cells)} |"


def format_figure(value: float | None, unit: str) -> str:
    """A figure with its unit, to three digits."""
    if value is None:
        return "not measured"
    digits = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def machine() -> str:
    """The devices and versions that a figure depends on, in one line."""
    names = (
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    cpu = next(names, platform.machine())  # ARM processors have no such line
    cores = len(os.sched_getaffinity(0))
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}{cpu}, {cores} cores, Python {platform.python_version()}, {versions}"
