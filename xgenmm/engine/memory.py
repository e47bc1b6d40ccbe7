"""How much memory an engine may use for its KV cache and for image features."""

import os

import numpy as np
import torch

from xgenmm.config import BLOCK_SIZE
from xgenmm.engine.scheduler import TOKENS_PER_TILE
from xgenmm.errors import InputError
from xgenmm.models.attention import prompt_segment
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tiling import TiledImage

MAX_CPU_CACHE_BYTES = 4 << 30

IMAGE_SHARE = 1 / 16
"""Share of the cache memory for image features, which are far smaller than keys and values."""


def cache_budget(model: XGenMM, gpu_memory_utilization: float, max_tokens: int) -> int:
    """Bytes for the KV cache and image features, for steps of up to `max_tokens` tokens.

    On a GPU, what is left of this share of its memory besides the weights, the largest step and
    other processes. On a CPU, a quarter of the free memory, at most 4 GB but at least enough for
    one request.
    """
    if model.device.type == "cuda":
        workspace = workspace_bytes(model, max_tokens)
        torch.cuda.empty_cache()  # what PyTorch holds in reserve counts as free
        free, total = torch.cuda.mem_get_info(model.device)
        return int(free - workspace - total * (1 - gpu_memory_utilization))
    return max(_least_bytes(model), min(MAX_CPU_CACHE_BYTES, free_cpu_bytes() // 4))


def split_budget(model: XGenMM, cache_bytes: int) -> tuple[int, int]:
    """Divide the budget into blocks of the KV cache and bytes for image features.

    Raises InputError if it does not hold the longest possible request.
    """
    block_bytes = KVCache.block_bytes(model.config.decoder, model.dtype)
    image_bytes = int(cache_bytes * IMAGE_SHARE)
    num_blocks = (cache_bytes - image_bytes) // block_bytes - 1
    if cache_bytes < _least_bytes(model):
        raise InputError(
            "cache_bytes",
            f"{cache_bytes} bytes hold {max(0, num_blocks) * BLOCK_SIZE} positions, fewer than the "
            f"{model.config.decoder.max_positions} of a request, which take {_least_bytes(model)} "
            "bytes; free memory on the device or quantize the weights",
        )
    return num_blocks, image_bytes


def free_cpu_bytes() -> int:
    """Free memory of this machine."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _least_bytes(model: XGenMM) -> int:
    """One request of the whole context; one block for padding and one for choices."""
    decoder = model.config.decoder
    blocks = -(-decoder.max_positions // BLOCK_SIZE) + 2
    return int(blocks * KVCache.block_bytes(decoder, model.dtype) / (1 - IMAGE_SHARE)) + 1


@torch.inference_mode()
def workspace_bytes(model: XGenMM, max_tokens: int) -> int:
    """Memory of the largest step besides weights and caches, found by running it."""
    config = model.config
    size = config.vision.image_size
    tiles = np.zeros((max(1, max_tokens // TOKENS_PER_TILE), size, size, 3), dtype=np.uint8)
    tokens = min(max_tokens, config.decoder.max_positions)
    cache = model.cache(-(-tokens // BLOCK_SIZE) + 1)
    table = torch.arange(1, cache.num_blocks, device=model.device)
    segment = prompt_segment(0, tokens, table, config.decoder.window_keys, model.dtype)
    embeds = torch.zeros(tokens, config.decoder.hidden_size, device=model.device).to(model.dtype)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    model.encode([TiledImage(tile[None], 0, 0, (size, size)) for tile in tiles])
    model.logits(model.forward(embeds, [segment], cache)[-1:])
    return torch.cuda.max_memory_allocated(model.device) - before
