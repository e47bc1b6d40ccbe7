"""Limit and eviction order of the cache of image features and tiles."""

import numpy as np
from numpy.typing import NDArray

from xgenmm.engine.lru_cache import LRUCache


def item(kilobytes: int) -> NDArray[np.uint8]:
    return np.zeros(kilobytes * 1024, dtype=np.uint8)


def test_least_recently_used_item_is_evicted() -> None:
    cache = LRUCache[NDArray[np.uint8]](10 * 1024)
    for name in (b"a", b"b", b"c"):
        cache.put(name, item(3))
    assert cache.get(b"a") is not None  # now b is the least recently used
    cache.put(b"d", item(3))
    assert [name for name in (b"a", b"b", b"c", b"d") if name in cache] == [b"a", b"c", b"d"]
    assert cache.used_bytes == 9 * 1024
    cache.put(b"huge", item(11))
    assert b"huge" not in cache
    cache.clear()
    assert (len(cache), cache.used_bytes, cache.get(b"a")) == (0, 0, None)
