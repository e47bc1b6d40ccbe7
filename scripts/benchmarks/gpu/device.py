"""The device under test: how much is measured, timing and memory, and the device's own limits."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scripts.benchmarks.random_data import TINY_CONFIG
from scripts.benchmarks.report import Row
from xgenmm.config import XGenMMConfig


@dataclass(frozen=True)
class Size:
    """How much is measured.

    batches: batch sizes of decode steps. context: positions. tokens: decode steps. text: tokens of
    a question. image: (width, height). copy: bytes of the copy that measures the bandwidth.
    matrix: side of the matrices that measure the arithmetic. rounds: of which the median counts.
    """

    config: XGenMMConfig
    batches: tuple[int, ...]
    context: int
    tokens: int
    text: int
    image: tuple[int, int]
    copy: int
    matrix: int
    rounds: int


FULL = Size(XGenMMConfig(), (1, 8, 32, 64), 800, 64, 32, (1600, 1200), 2**31, 8192, 5)
TINY = Size(TINY_CONFIG, (1, 3), 40, 4, 8, (80, 60), 2**20, 64, 2)


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

    def reset_peak_memory(self) -> None:
        """Start a new measurement of `peak_memory`."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> float:
        """The peak of device memory in GB since the last reset; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0


def limits(device: Device, size: Size) -> tuple[float, float, list[Row]]:
    """The device's bandwidth in bytes/s, its matrix product in FLOP/s, and both as rows.

    A copied byte counts twice, as it is read and written.
    """
    source = torch.ones(size.copy, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    bandwidth = 2 * size.copy / device.seconds(lambda: target.copy_(source), size.rounds)
    a, b = (
        torch.randn(size.matrix, size.matrix, device=device.device, dtype=device.dtype)
        for _ in range(2)
    )
    matmul_rate = 2 * size.matrix**3 / device.seconds(lambda: a @ b, size.rounds)
    rows = [
        Row("ceilings", "copy, read and written", bandwidth / 1e9, "GB/s"),
        Row("ceilings", f"matrix product, {device.dtype}", matmul_rate / 1e12, "TFLOP/s"),
    ]
    return bandwidth, matmul_rate, rows
