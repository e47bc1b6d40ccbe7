"""A thread-safe least-recently-used cache with a limit in bytes."""

import threading
from typing import Generic, Protocol, TypeVar

import cachetools


class Sized(Protocol):
    """Anything with a size in memory, such as a tensor."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


Item = TypeVar("Item", bound=Sized)


class LRUCache(Generic[Item]):
    """`cachetools.LRUCache` measured in bytes, with a lock."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._items: cachetools.LRUCache[bytes, Item] = cachetools.LRUCache(
            max_bytes, getsizeof=lambda item: item.nbytes
        )
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Total size of the cached items."""
        return int(self._items.currsize)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: bytes) -> bool:
        return key in self._items

    def get(self, key: bytes) -> Item | None:
        """Return the item and mark it as most recently used, or return None."""
        with self._lock:
            return self._items.get(key)

    def put(self, key: bytes, item: Item) -> None:
        """Cache an item under a new key, unless it alone exceeds `max_bytes`.

        The item must own its memory: the size of a view is not that of the memory it keeps
        alive.
        """
        if item.nbytes > self.max_bytes:
            return
        with self._lock:
            if key not in self._items:
                self._items[key] = item

    def clear(self) -> None:
        """Drop all items."""
        with self._lock:
            self._items.clear()
