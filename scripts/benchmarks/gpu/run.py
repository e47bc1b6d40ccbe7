"""The part `gpu`: speed and memory of a model of the released size.

Takes random weights, since speed does not depend on their values. Measures the device's own limits
first, then Cog's server, the model, and `transformers` on the same decoder weights: as the
published packagings run it (eager `generate`, float32 and bfloat16), and with a static cache and
`torch.compile`.
"""

import tempfile
import time
from pathlib import Path

import torch

from scripts.benchmarks.gpu.baseline import baseline
from scripts.benchmarks.gpu.decode import correctness, decoding
from scripts.benchmarks.gpu.device import FULL, TINY, Device, limits
from scripts.benchmarks.gpu.loading import quantizing
from scripts.benchmarks.gpu.prompt import first_tokens, vision
from scripts.benchmarks.gpu.server import server
from scripts.benchmarks.random_data import write_weights
from scripts.benchmarks.report import Options, Row


def gpu(options: Options) -> list[Row]:
    """Measure everything, in an order that fits the device's memory."""
    started = time.perf_counter()
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    size = TINY if options.tiny else FULL
    bandwidth, matmul_rate, rows = limits(device, size)
    rows += server(device, size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(folder, size.config, device.device, device.dtype)
        model, found = quantizing(device, folder, size)
    rows += found
    rows += decoding(device, model, size, bandwidth)
    one_word, found = first_tokens(device, model, size)
    rows += found
    rows += vision(device, model, size, matmul_rate)
    rows += correctness(device, model, size)
    rows += baseline(device, model, size, one_word)
    seconds = time.perf_counter() - started
    return [*rows, Row("all", "this part", seconds, "s", at_most=480.0)]
