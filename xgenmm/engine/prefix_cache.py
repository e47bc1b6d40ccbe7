"""Caches that outlive a request: encoded images, and keys and values of prompt prefixes.

Both are least-recently-used caches with a limit in bytes, in the memory of the model's device. They
belong to one engine, hence to one checkpoint in one dtype; the hashes of `prompt_hashes.py` cover
everything else that an entry depends on.
"""

from collections.abc import Sequence

import torch

from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.prompt_hashes import BLOCK_SIZE
from xgenmm.models.kv_cache import KVCache

IMAGE_SHARE = 1 / 8
"""Share of the cache memory for image features, which are far smaller than keys and values."""


class PrefixCache:
    """Keys and values of prompt prefixes, in blocks that are shared by equal prefixes."""

    def __init__(self, max_bytes: int) -> None:
        self.blocks: LRUCache[torch.Tensor] = LRUCache(max_bytes)

    def restore(self, hashes: Sequence[bytes], kv_cache: KVCache, slot: int) -> int:
        """Copy the leading cached blocks into a slot; returns the number of positions copied."""
        length = 0
        for block_hash in hashes:
            block = self.blocks.get(block_hash)  # [2, layers, heads, BLOCK_SIZE, head_dim]
            if block is None:
                break
            part = slice(length, length + BLOCK_SIZE)
            kv_cache.keys[:, slot, :, part], kv_cache.values[:, slot, :, part] = block
            length += BLOCK_SIZE
        return length

    def save(self, hashes: Sequence[bytes], kv_cache: KVCache, slot: int) -> None:
        """Cache the first `len(hashes)` blocks of a slot."""
        if 2 * kv_cache.keys[:, slot, :, :BLOCK_SIZE].nbytes > self.blocks.max_bytes:
            return
        # The last block first, so that the end of a prefix is evicted before its beginning.
        for index in reversed(range(len(hashes))):
            if self.blocks.get(hashes[index]) is None:
                part = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
                block = (kv_cache.keys[:, slot, :, part], kv_cache.values[:, slot, :, part])
                self.blocks.put(hashes[index], torch.stack(block))


class Caches:
    """Everything an engine caches on its device between requests, within `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.image_features: LRUCache[torch.Tensor] = LRUCache(int(max_bytes * IMAGE_SHARE))
        self.prefixes = PrefixCache(max_bytes - self.image_features.max_bytes)

    @property
    def used_bytes(self) -> int:
        """Total size of the cached tensors."""
        return self.image_features.used_bytes + self.prefixes.blocks.used_bytes

    def clear(self) -> None:
        """Drop all entries."""
        self.image_features.clear()
        self.prefixes.blocks.clear()
