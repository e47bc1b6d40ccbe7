"""A figure that was measured, what it should be, and both as a line of a Markdown table."""

from dataclasses import dataclass

HEAD = "| part | measured | figure | goal | met |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """One figure, and what it should be."""

    part: str
    measured: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high

    def __str__(self) -> str:
        goal = ""
        if self.at_least is not None:
            goal = f"≥ {_figure(self.at_least, self.unit)}"
        elif self.at_most is not None:
            goal = f"≤ {_figure(self.at_most, self.unit)}"
        met = {True: "yes", False: "**no**", None: ""}[self.met]
        cells = (self.part, self.measured, _figure(self.value, self.unit), goal, met)
        return f"| {' | '.join(cells)} |"


def _figure(value: float, unit: str) -> str:
    digits = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}".strip()
