"""The schedulers of one model, which share its weights and what is kept between requests.

One, as a rule. A small model on a CPU gets several, up to one a core: its operations are too short
to be shared by cores, which would wait for each other after every one. What runs alone still takes
all cores for its images and its prompt.
"""

import atexit
from collections.abc import Collection
from weakref import WeakSet

import torch

from xgenmm.engine.prefix_cache import Caches
from xgenmm.engine.sampling_params import MOST_BEAMS
from xgenmm.engine.scheduler import EngineRequest, Scheduler, is_small
from xgenmm.models.xgenmm import XGenMM

EXIT_SECONDS = 10.0
"""For the piece of work that is under way when the interpreter ends."""

_POOLS: "WeakSet[SchedulerPool]" = WeakSet()


@atexit.register
def _abandon() -> None:
    """Stop what still runs: a thread in PyTorch when the interpreter ends aborts the process."""
    for pool in list(_POOLS):
        pool.close(finish=False)
        pool.join(EXIT_SECONDS)


class SchedulerPool:
    """Answers each request by the scheduler that has the least to do.

    Args:
        model: on its device.
        end_ids: the tokens that end a beam.
        slots: of all schedulers together.
        cache_bytes: for what is kept between requests.
        pieces: of encoding and prefill that are done between two decode steps.
    """

    def __init__(
        self,
        model: XGenMM,
        end_ids: Collection[int],
        slots: int,
        cache_bytes: int,
        pieces: int = 1,
    ) -> None:
        self.slots = slots
        self.caches = Caches(cache_bytes)
        self._cores = torch.get_num_threads()
        count = 1
        if model.device.type == "cpu" and is_small(model):
            # Every search fits each of them.
            count = max(1, min(self._cores, slots // MOST_BEAMS))
        self.schedulers = [
            Scheduler(
                model,
                end_ids,
                slots // count + (number < slots % count),
                self.caches,
                pieces,
                self._threads,
                name=f"scheduler {number + 1} of {count}",
            )
            for number in range(count)
        ]
        _POOLS.add(self)

    def submit(self, job: EngineRequest) -> None:
        """Queue a job. Raises EngineError when the engine is shut down or broken."""
        min(self.schedulers, key=lambda scheduler: scheduler.busy).submit(job)

    def check(self) -> None:
        """Raise EngineError if a scheduler is dead or stuck."""
        for scheduler in self.schedulers:
            scheduler.check()

    def close(self, *, finish: bool = True) -> None:
        """Refuse new jobs; threads stop when the accepted ones have ended, or are cancelled."""
        for scheduler in self.schedulers:
            scheduler.close(finish=finish)

    def join(self, timeout: float | None = None) -> None:
        """Wait, at most `timeout` seconds for each, until the threads have stopped."""
        for scheduler in self.schedulers:
            scheduler.join(timeout)

    def _threads(self) -> int:
        """How many of PyTorch's threads each busy scheduler may take."""
        busy = sum(scheduler.busy > 0 for scheduler in self.schedulers)
        return max(1, self._cores // max(1, busy))
