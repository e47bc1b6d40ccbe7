"""Layout of the paged KV cache."""

import torch

from xgenmm.config import BLOCK_SIZE, DecoderConfig
from xgenmm.models.kv_cache import KVCache, slots

CONFIG = DecoderConfig(hidden_size=8, num_layers=2, num_heads=2)


def allocate(num_blocks: int, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache.allocate(CONFIG, num_blocks, device=torch.device("cpu"), dtype=dtype)


def test_memory_of_the_cache_is_that_of_its_blocks() -> None:
    cache = allocate(5, torch.bfloat16)
    assert cache.num_blocks == 5
    assert cache.keys.shape == cache.values.shape == (2, 5, BLOCK_SIZE, 2, 4)
    nbytes = cache.keys.nbytes + cache.values.nbytes
    assert nbytes == 5 * KVCache.block_bytes(CONFIG, torch.bfloat16)


def test_slots_of_positions() -> None:
    tables = torch.tensor([[3, 1, 2], [4, 5, 0]], dtype=torch.int32)
    positions = torch.tensor([[0, BLOCK_SIZE + 1, 3 * BLOCK_SIZE - 1], [-1, 2 * BLOCK_SIZE - 1, 7]])
    expected = [
        [3 * BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE - 1],
        [0, 6 * BLOCK_SIZE - 1, 4 * BLOCK_SIZE + 7],
    ]
    assert slots(tables, positions).tolist() == expected


def test_layer_is_a_view_by_slot() -> None:
    cache = allocate(4)
    keys, values = cache.layer(1)
    (slot,) = slots(torch.tensor([[2, 3]]), torch.tensor([[BLOCK_SIZE + 5]]))[0].tolist()
    keys[slot], values[slot] = 1, 2
    assert cache.keys[1, 3, 5].unique().tolist() == [1]
    assert cache.values[1, 3, 5].unique().tolist() == [2]
    assert int(cache.keys.count_nonzero()) == int(cache.values.count_nonzero()) == 8


def test_blocks_are_copied_in_all_layers() -> None:
    cache = allocate(5)
    torch.manual_seed(0)
    cache.keys.normal_()
    cache.values.normal_()
    before = KVCache(cache.keys.clone(), cache.values.clone())
    cache.copy_blocks(torch.tensor([3, 3, 1]), torch.tensor([4, 2, 0]))
    contents = [1, 1, 3, 3, 3]  # the earlier block that each block equals now
    assert torch.equal(cache.keys, before.keys[:, contents])
    assert torch.equal(cache.values, before.values[:, contents])
