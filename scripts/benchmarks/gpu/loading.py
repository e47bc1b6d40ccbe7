"""Loading time, memory, and the speed and error of quantised weights."""

import logging
import time
from pathlib import Path

import torch

from scripts.benchmarks.gpu.decode import decode_seconds
from scripts.benchmarks.gpu.device import Device, Size
from scripts.benchmarks.gpu.prompt import embed
from scripts.benchmarks.random_data import photo_jpeg
from scripts.benchmarks.report import Row
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.evaluation.parity import all_logits
from xgenmm.kernels.cuda_graphs import build_decode_step
from xgenmm.models.quantization import QUANTIZATIONS, check_quantization, drift
from xgenmm.models.xgenmm import XGenMM

logger = logging.getLogger(__name__)

MEMORY_GOALS = {"bfloat16": 11.0, "int8": 7.0}  # GB


def quantizing(device: Device, folder: Path, size: Size) -> tuple[XGenMM, list[Row]]:
    """Compare each kind of quantisation with the plain model in `folder`; returns that model."""
    model, plain_seconds, rows = _load(device, folder, size, None)
    torch.manual_seed(1)
    embeds = torch.randn(64, size.config.decoder.hidden_size, device=device.device) * 0.02
    embeds = embeds.to(device.dtype)
    exact = all_logits(model, embeds)
    if device.cuda:
        model.to("cpu")  # so that only one model counts in a memory measurement
    for kind in QUANTIZATIONS:
        try:
            check_quantization(kind, device.device)
        except ValueError as error:
            logger.warning("%s", error)
            continue
        quantized, seconds, found = _load(device, folder, size, kind)
        moved = drift(exact, all_logits(quantized, embeds))
        del quantized
        rows += [
            *found,
            Row("quantised", f"{kind}: decode, batch 1", 1 / seconds, "tokens/s"),
            Row("quantised", f"{kind}: against bfloat16", plain_seconds / seconds, "x", 1.6),
            Row("quantised", f"{kind}: drift of the logits", 100 * moved.relative, "%"),
            Row("quantised", f"{kind}: same most likely token", 100 * moved.agreement, "%"),
        ]
    return model.to(device.device), rows


def _load(
    device: Device, folder: Path, size: Size, kind: str | None
) -> tuple[XGenMM, float, list[Row]]:
    """Read the model from `folder`; returns it, its seconds a token at batch 1, and the rows."""
    with torch.device("meta"):
        model = XGenMM(size.config)
    name = kind or str(device.dtype).removeprefix("torch.")
    device.reset_peak_memory()
    started = time.perf_counter()
    load_parameters(model, folder, device=device.device, dtype=device.dtype, quantize=kind)
    device.synchronize()
    loaded = time.perf_counter()
    model.eval().requires_grad_(False)
    cache = model.cache(1, size.config.decoder.max_positions)
    decode = build_decode_step(model, cache)
    device.synchronize()
    ready = time.perf_counter()
    embeds = embed(model, [photo_jpeg(size.image, 0)], size.text)
    int(model.prefill([embeds], cache).argmax(-1))

    def step(tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        return decode(tokens, positions, cache, length)

    seconds = decode_seconds(device, step, 1, size)
    peak, goal = device.peak_memory(), MEMORY_GOALS.get(name)
    rows = [
        Row("start", f"{name}: read from the page cache to the device", loaded - started, "s"),
        Row("start", f"{name}: kernels and graphs", ready - loaded, "s"),
        Row("memory", f"{name}: peak with one stream", peak, "GB", at_most=goal),
    ]
    return model, seconds, rows
