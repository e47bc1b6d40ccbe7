"""Progress of long work: a bar on a terminal, a line every few seconds where there is none."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

INTERVAL = 10.0


class Progress:
    """Shows how many units of `total` are done, with the newest values and the time left.

    Attributes of the work: `unit` names one of it, as in "step 12 of 300"; `initial` units were
    done before.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        shown: bool = True,
        interval: float = INTERVAL,
    ) -> None:
        """interval: least seconds between two lines; the first and last units have one anyway."""
        self._total, self._unit, self._initial = total, unit, initial
        terminal = sys.stderr.isatty()
        self._logs, self._interval = shown and not terminal, interval
        self._bar = tqdm(total=total, initial=initial, unit=unit, disable=not (shown and terminal))
        self._done, self._started, self._logged = initial, time.monotonic(), float("-inf")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, **values: str) -> None:
        """Count one unit; values are shown beside it, e.g. `loss="1.234"`."""
        self._done += 1
        self._bar.set_postfix(values, refresh=False)
        self._bar.update()
        now = time.monotonic()
        due = now - self._logged >= self._interval or self._done == self._total
        if self._logs and due:
            self._logged = now
            logger.info("%s", self._line(now - self._started, values))

    def _line(self, seconds: float, values: dict[str, str]) -> str:
        each = seconds / (self._done - self._initial)
        shown = [f"{key} {value}" for key, value in values.items()]
        article = "an" if self._unit[0] in "aeiou" else "a"
        shown += [f"{each:.2g} s {article} {self._unit}", f"{_duration(each * self._left)} left"]
        return f"{self._unit} {self._done} of {self._total}: {', '.join(shown)}"

    @property
    def _left(self) -> int:
        return self._total - self._done


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
