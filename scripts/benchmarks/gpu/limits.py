"""The device's own limits, which other figures are compared with."""

from collections.abc import Iterator

from scripts.benchmarks.gpu.context import Context
from scripts.benchmarks.gpu.figures import Figure


def limits(context: Context) -> Iterator[Figure]:
    """Measure memory bandwidth and arithmetic."""
    yield Figure("copy, read and written", context.bandwidth / 1e9, "GB/s")
    dtype = str(context.device.dtype).removeprefix("torch.")
    yield Figure(f"matrix product, {dtype}", context.matmul_rate / 1e12, "TFLOP/s")
