"""The device under test: how much is measured on it, timing and memory."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xgenmm.config import XGenMMConfig

COLD_BYTES = 256 << 20
"""Weights of this size are not in a GPU's cache (50 MB on an H100) when they are read again."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    batches: batch sizes of decode steps. context: positions of each row. tokens: of an answer.
    prompts: lengths of prefilled prompts. text: tokens of a question. image: (width, height).
    requests: at once. lengths: different prompt lengths. copy: bytes of the copy that measures the
    bandwidth. matrix: side of the matrices that measure the arithmetic. rounds: of which the median
    counts.
    """

    config: XGenMMConfig
    batches: tuple[int, ...]
    context: int
    tokens: int
    prompts: tuple[int, ...]
    text: int
    image: tuple[int, int]
    requests: int
    lengths: int
    copy: int
    matrix: int
    rounds: int


class Device:
    """Timing and memory of the device under test."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32

    def synchronize(self) -> None:
        """Wait until all submitted work is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """The median time of `rounds` calls, after one to warm up."""
        times = []
        for _ in range(rounds + 1):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def launch_seconds(self, launches: Sequence[Callable[[], object]], rounds: int) -> float:
        """The mean time of a launch, without that of the host: they are one CUDA graph on a GPU."""

        def run() -> None:
            for launch in launches:
                launch()

        work: Callable[[], object] = run
        if self.cuda:
            launches[0]()  # compiles
            self.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            work = graph.replay
        return self.seconds(work, rounds) / len(launches)

    def reset_peak_memory(self) -> None:
        """Start a new measurement of `peak_memory`."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> float:
        """The peak of device memory in GB since the last reset; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0
