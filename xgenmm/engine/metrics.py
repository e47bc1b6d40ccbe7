"""What an engine has done: counters, a snapshot for callers, and a summary in the log."""

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import get_args

from xgenmm.engine.request import StopReason, Usage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStatus:
    """A snapshot of an engine.

    running, waiting: requests with and without a place in the batch.
    free_blocks: of the `num_blocks` of the KV cache. cached_blocks: those that can be found again.
    preemptions: how often a request gave up its blocks to older ones and was computed again.
    closed: whether new requests are refused.
    steps, output_tokens, tiles_encoded, prompt_tokens, cached_tokens: totals since the start;
        `cached_tokens` of the prompt tokens were not computed again.
    image_cache_bytes: memory of the cached image features.
    decode_path: `kernels`, or `plain` on a CPU or if the kernels have failed their check.
    """

    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    cached_blocks: int
    preemptions: int
    closed: bool
    steps: int
    output_tokens: int
    tiles_encoded: int
    prompt_tokens: int
    cached_tokens: int
    image_cache_bytes: int
    decode_path: str


class Metrics:
    """Counters of the engine's thread.

    totals: steps, step_requests (requests summed over steps), output_tokens, tiles_encoded,
        prompt_tokens, cached_tokens, and the finished requests by stop reason.
    """

    def __init__(self, summary_seconds: float) -> None:
        self.totals: Counter[str] = Counter()
        self._summary_seconds = summary_seconds
        self._logged = self.totals.copy()
        self._since = time.monotonic()

    def finish(self, usage: Usage) -> None:
        """Count a finished request."""
        self.totals[usage.stop_reason] += 1
        self.totals["output_tokens"] += usage.output_tokens

    def resume(self) -> None:
        """After idle time, let at most one interval of it count towards the next summary."""
        self._since = max(self._since, time.monotonic() - self._summary_seconds)

    def log_summary(self, running: int, waiting: int, decode_path: str) -> None:
        """Log what was done since the last summary, if that is long enough ago."""
        seconds = time.monotonic() - self._since
        if seconds < self._summary_seconds:
            return
        counts = self.totals - self._logged
        finished = [
            f"{counts[reason]} {reason}" for reason in get_args(StopReason) if counts[reason]
        ]
        logger.info(
            "last %.0f s: %s; %d running, %d waiting; %.1f tokens/s, %.1f requests per step; "
            "%d tiles encoded, %d of %d prompt tokens cached; decode path: %s",
            seconds,
            ", ".join(finished) or "no request finished",
            running,
            waiting,
            counts["output_tokens"] / seconds,
            counts["step_requests"] / max(1, counts["steps"]),
            counts["tiles_encoded"],
            counts["cached_tokens"],
            counts["prompt_tokens"],
            decode_path,
        )
        self._logged = self.totals.copy()
        self._since = time.monotonic()
