"""Decode steps: their rate against the bandwidth, and their logits against float32."""

from collections.abc import Callable

import torch

from scripts.benchmarks.gpu.device import Device, Size
from scripts.benchmarks.report import Row
from xgenmm.config import DecoderConfig
from xgenmm.kernels.cuda_graphs import build_decode_step
from xgenmm.models.phi3 import Phi3Decoder
from xgenmm.models.quantization import drift
from xgenmm.models.xgenmm import XGenMM

GOALS = {1: 88.0, 32: 70.0}  # percent of the bandwidth, by batch size

Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""A decode step on a certain cache: tokens [batch], positions [batch], length -> logits."""


def decoding(device: Device, model: XGenMM, size: Size, bandwidth: float) -> list[Row]:
    """The rate of each batch size, and the share of the bandwidth that it uses."""
    cache = model.cache(max(size.batches), size.context + size.tokens)
    decode = build_decode_step(model, cache)

    def step(tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        return decode(tokens, positions, cache, length)

    rows = []
    for batch in size.batches:
        seconds = decode_seconds(device, step, batch, size)
        read = _weight_bytes(model.decoder)
        read += _cache_bytes(model.config.decoder, batch, size.context, device.dtype)
        rows += [
            Row("decode", f"batch {batch}, context {size.context}", batch / seconds, "tokens/s"),
            Row(
                "decode",
                f"batch {batch}, of what the copy bandwidth allows",
                100 * read / bandwidth / seconds,
                "%",
                at_least=GOALS.get(batch),
            ),
        ]
    return rows


def decode_seconds(device: Device, step: Step, batch: int, size: Size) -> float:
    """Seconds of a greedy step of `batch` rows around `size.context` positions.

    Tokens stay on the device.
    """
    start = size.context - size.tokens // 2

    def run() -> None:
        tokens = torch.zeros(batch, dtype=torch.int64, device=device.device)
        positions = torch.full_like(tokens, start)
        for number in range(size.tokens):
            tokens = step(tokens, positions, start + number + 1).argmax(-1)
            positions += 1

    with torch.inference_mode():
        return device.seconds(run, size.rounds) / size.tokens


def _weight_bytes(decoder: Phi3Decoder) -> int:
    """Bytes of weights that a decode step must read: all but the embeddings."""
    state = decoder.state_dict()
    tensors = (tensor for name, tensor in state.items() if "embed" not in name)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cache_bytes(config: DecoderConfig, batch: int, context: int, dtype: torch.dtype) -> int:
    """Bytes of the key/value cache that a decode step must read."""
    return 2 * config.num_layers * batch * context * config.hidden_size * dtype.itemsize


def correctness(device: Device, model: XGenMM, size: Size) -> list[Row]:
    """The logits of a decode step against those of float32 with the same weights."""
    torch.manual_seed(2)
    length = size.context // 4
    embeds = (torch.randn(length, size.config.decoder.hidden_size) * 0.02).to(device.device)
    token = torch.tensor([5], device=device.device)
    positions = torch.full_like(token, length)
    logits = []
    for dtype in (torch.float32, device.dtype):
        model.to(dtype)
        cache = model.cache(1, length + 1)
        model.prefill([embeds.to(dtype)], cache)
        step = build_decode_step(model, cache) if dtype == device.dtype else model.decode
        logits.append(step(token, positions, cache, length + 1).clone())
    error = drift(*logits).relative
    return [Row("correctness", "logits against float32, relative", error, at_most=2e-2)]
