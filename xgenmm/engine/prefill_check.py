"""Compares the prefill over the paged cache with the reference, before the engine serves."""

import torch

from xgenmm.config import BLOCK_SIZE
from xgenmm.engine.reference import next_logits
from xgenmm.errors import EngineError
from xgenmm.kernels.self_check import LIMITS
from xgenmm.models.attention import GrowingCache, prompt_segment
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.quantization import drift
from xgenmm.models.xgenmm import XGenMM


@torch.inference_mode()
def check_prefill(model: XGenMM, cache: KVCache) -> float:
    """Prefill one random prompt in two chunks, over shuffled blocks of a cache not yet in use.

    Returns how far the logits are from those of the reference, relative to their norm. Raises
    EngineError if that is more than rounding explains.
    """
    config, device = model.config.decoder, model.device
    length = min(5 * BLOCK_SIZE + 7, config.max_positions - 1)
    lengths = (length // 3, length - length // 3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.initial_vocab, (length,), generator=generator)
    embeds = model.embed_ids(ids.tolist())
    table = 1 + torch.randperm(-(-length // BLOCK_SIZE), generator=generator).to(device)
    start = 0
    for count in lengths:
        segment = prompt_segment(start, count, table, config.window_keys, model.dtype)
        hidden = model.forward(embeds[start : start + count], [segment], cache)
        start += count
    expected = next_logits(model, embeds[None], 0, GrowingCache(config.window_keys))
    difference = drift(expected, model.logits(hidden[-1:])).relative
    if not difference <= LIMITS[model.dtype]:  # also if it is NaN
        raise EngineError(
            f"the logits after a prompt differ from the reference's by {difference:.2g} of their "
            f"norm, and rounding explains {LIMITS[model.dtype]:g}; this machine would give wrong "
            "answers: run `xgenmm doctor` and report what it prints"
        )
    return difference
