"""How much memory an engine may use."""

import logging
import os

import torch

from xgenmm.kernels.cuda_graphs import MAX_ROWS
from xgenmm.models.xgenmm import XGenMM

logger = logging.getLogger(__name__)

MAX_CACHE_BYTES = 4 << 30


def fitting_slots(model: XGenMM, wanted: int) -> int:
    """How many of `wanted` slots fit a decode step and half of the free memory; at least 1."""
    decoder = model.config.decoder
    position_bytes = 2 * decoder.num_layers * decoder.hidden_size * model.dtype.itemsize
    slot_bytes = position_bytes * (decoder.max_positions + 1)
    fitting = min(MAX_ROWS, max(1, _free_bytes(model.device) // 2 // slot_bytes))
    if fitting < wanted:
        logger.info(
            "%d slots of %.1f GB instead of %d fit a decode step and half of the free memory; "
            "further requests wait",
            fitting, slot_bytes / 1e9, wanted,
        )  # fmt: skip
    return min(wanted, fitting)


def default_cache_bytes(model: XGenMM) -> int:
    """Memory for what is cached between requests: an eighth of what is free, at most 4 GB."""
    return min(MAX_CACHE_BYTES, _free_bytes(model.device) // 8)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch holds in reserve counts as free
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
