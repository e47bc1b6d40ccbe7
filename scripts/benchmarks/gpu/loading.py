"""Loading time, memory, and the speed and error of quantized weights."""

import time
from collections.abc import Iterator

import torch

from scripts.benchmarks.gpu.context import ONE_REQUEST_BYTES, Context
from scripts.benchmarks.gpu.engine import answer_seconds, token_seconds
from scripts.benchmarks.gpu.figures import Figure
from xgenmm.engine.load import load
from xgenmm.evaluation.parity import all_logits
from xgenmm.models.quantization import QUANTIZATIONS, drift


def loading(context: Context) -> Iterator[Figure]:
    """Measure an engine for one stream from a checkpoint in the page cache, by kind of weights."""
    size, device, checkpoint = context.size, context.device, context.checkpoint
    context.drop_model()  # so that only one model counts in a memory measurement
    torch.manual_seed(1)
    embeds = torch.randn(64, size.config.decoder.hidden_size, device=device.device) * 0.02
    embeds = embeds.to(device.dtype)
    exact, plain_token = torch.empty(0), 0.0
    for kind in ("plain", *QUANTIZATIONS):
        if kind == "fp8" and device.cuda and torch.cuda.get_device_capability() < (8, 9):
            continue
        quantize = None if kind == "plain" else kind
        device.reset_peak_memory()
        started = time.perf_counter()
        engine = load(checkpoint, device.device, device.dtype, 1, ONE_REQUEST_BYTES, quantize)
        try:
            yield Figure(f"{kind} weights: load", time.perf_counter() - started, "s")
            engine.warm_up()
            yield Figure(f"{kind} weights: load and warm up", time.perf_counter() - started, "s")
            answer_seconds(engine, context.image(0), "", size.tokens)
            memory = device.peak_memory()
            yield Figure(f"{kind} weights: peak of device memory, one stream", memory, "GB")
            token = token_seconds(context, engine)
            yield Figure(f"{kind} weights: decode, 1 stream", 1 / token, "tokens/s")
            with torch.inference_mode():
                logits = all_logits(engine.model, embeds)
        finally:
            engine.close()
            del engine
        if quantize is None:
            exact, plain_token = logits, token
            continue
        moved = drift(exact, logits)
        details = {"% of first tokens equal": 100 * moved.agreement}
        yield Figure(f"{kind} weights: decode against plain", plain_token / token, "x")
        yield Figure(f"{kind} weights: drift of the logits", 100 * moved.relative, "%", details)
