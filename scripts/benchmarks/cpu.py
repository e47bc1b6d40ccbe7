"""The part `cpu`: a mid-size random decoder in float32 against `transformers`.

Both take turns in one process. The best round of each counts, since other work on the machine only
ever makes a round slower. The vision tower is that of transformers, so it is not compared.
"""

import dataclasses
import time

import torch

from scripts.benchmarks.random_data import TINY_CONFIG, random_model
from scripts.benchmarks.report import Options, Row
from scripts.benchmarks.transformers_baseline import time_generate
from xgenmm.config import BLOCK_SIZE, DecoderConfig, VisionConfig
from xgenmm.models.attention import prompt_segment
from xgenmm.models.phi3_huggingface import to_transformers
from xgenmm.models.xgenmm import XGenMM

MID_SIZE = dataclasses.replace(
    TINY_CONFIG,
    vision=VisionConfig("siglip", 384, 1536, 12, 6),
    decoder=DecoderConfig(hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=8),
)


def cpu(options: Options) -> list[Row]:
    """Measure prefill and decode steps at batch size 1."""
    config, context, tokens, rounds = MID_SIZE, 800, 24, 6
    if options.tiny:
        config, context, tokens, rounds = TINY_CONFIG, 40, 4, 2
    model = random_model(config, torch.device("cpu"), torch.float32)
    baseline = to_transformers(model.decoder, torch.float32)
    torch.manual_seed(4)
    embeds = torch.randn(1, context, config.decoder.hidden_size) * 0.02
    best = [float("inf")] * 4
    for _ in range(rounds):
        times = (
            *_time_decoder(model, embeds[0], tokens),
            *time_generate(baseline, embeds, tokens),
        )
        best = [min(pair) for pair in zip(best, times, strict=True)]
    prefill, token, baseline_prefill, baseline_token = best
    return [
        Row("cpu", f"prefill of {context}", 1e3 * prefill, "ms"),
        Row("cpu", f"prefill of {context}, transformers", 1e3 * baseline_prefill, "ms"),
        Row("cpu", "prefill, times as fast", baseline_prefill / prefill, "x", at_least=1.0),
        Row("cpu", "decode step", 1e3 * token, "ms"),
        Row("cpu", "decode step, transformers", 1e3 * baseline_token, "ms"),
        Row("cpu", "decode, times as fast", baseline_token / token, "x", at_least=1.3),
    ]


@torch.inference_mode()
def _time_decoder(model: XGenMM, embeds: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, allocation of the cache included, and from each to the next.

    embeds: [positions, width].
    """
    length, window = embeds.shape[0], model.config.decoder.window_keys
    started = time.perf_counter()
    cache = model.cache(1 + -(-(length + tokens) // BLOCK_SIZE))
    tables = torch.arange(1, cache.num_blocks)[None]
    segment = prompt_segment(0, length, tables[0], window, model.dtype)
    token = model.logits(model.forward(embeds, [segment], cache)[-1:]).argmax(-1)
    int(token)
    first = time.perf_counter()
    for position in range(length, length + tokens - 1):
        positions = token.new_tensor([position])
        token = model.decode(token, positions, tables, cache, position + 1).argmax(-1)
        int(token)
    return first - started, (time.perf_counter() - first) / (tokens - 1)
