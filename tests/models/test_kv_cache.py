"""Reordering of cache rows."""

import torch

from xgenmm.config import DecoderConfig
from xgenmm.models.kv_cache import KVCache

CONFIG = DecoderConfig(hidden_size=8, num_layers=2, num_heads=2)


def numbered_cache(rows: int) -> KVCache:
    """A cache whose keys equal their row number and whose values equal its negative."""
    cache = KVCache.allocate(CONFIG, rows, 6, device=torch.device("cpu"), dtype=torch.float32)
    number = torch.arange(rows)[:, None, None, None]
    cache.keys[:] = number
    cache.values[:] = -number
    return cache


def test_reorder_reads_all_rows_before_writing() -> None:
    cache = numbered_cache(3)
    cache.reorder(torch.tensor([1, 0]), length=4)
    assert cache.keys[1, :, 0, 3, 0].tolist() == [1, 0, 2]
    assert cache.values[0, :, 1, 3, 3].tolist() == [-1, 0, -2]
    assert cache.keys[1, :, 0, 4, 0].tolist() == [0, 1, 2]  # beyond the length


def test_reorder_writes_to_the_given_rows() -> None:
    cache = numbered_cache(4)
    cache.reorder(torch.tensor([3, 3]), length=6, into=torch.tensor([0, 2]))
    assert cache.keys[0, :, 0, 5, 0].tolist() == [3, 1, 3, 3]
