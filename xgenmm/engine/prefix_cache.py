"""What an engine remembers between requests: encoded images, and keys and values of prompts.

Both are least-recently-used stores with a budget in bytes, in the memory of the model's device.
They belong to one engine, so to one checkpoint in one dtype; a key covers the rest: an image's
pixels and tiling, and a prompt's every position up to the last one that is reused. All of it may be
used from several threads.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from xgenmm.models.kv_cache import KVCache
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage

BLOCK = 32
"""Positions whose keys and values are kept and found together."""

IMAGE_SHARE = 1 / 8
"""Of the caches' budget: vision tokens are far smaller than keys and values."""


class Sized(Protocol):
    """What says how much memory it takes, as a tensor does."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


Item = TypeVar("Item", bound=Sized)


class LRUCache(Generic[Item]):
    """Items by key; what was used longest ago goes first when they outgrow `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._held: OrderedDict[bytes, Item] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def get(self, key: bytes) -> Item | None:
        """The item, which counts as used now, or None."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: bytes, item: Item) -> None:
        """Keep an item that is nobody else's view; one larger than the budget is not kept."""
        with self._lock:
            if key in self._held or item.nbytes > self.budget:
                return
            self._held[key] = item
            self.used += item.nbytes
            while self.used > self.budget:
                _, oldest = self._held.popitem(last=False)
                self.used -= oldest.nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self.used = 0


class PrefixCache:
    """Keys and values of the beginnings of prompts, in blocks that follow one another.

    A block's key is a hash over all positions up to its end, so that equal keys mean equal
    beginnings, and prompts that begin alike share their first blocks.
    """

    def __init__(self, budget: int) -> None:
        self.store: LRUCache[torch.Tensor] = LRUCache(budget)

    def restore(self, keys: Sequence[bytes], cache: KVCache, row: int) -> int:
        """Fill the front of a row with the blocks that are held; returns how many positions."""
        length = 0
        for key in keys:
            block = self.store.get(key)  # [2, layers, heads, BLOCK, head_dim]
            if block is None:
                break
            part = slice(length, length + BLOCK)
            cache.keys[:, row, :, part], cache.values[:, row, :, part] = block
            length += BLOCK
        return length

    def save(self, keys: Sequence[bytes], cache: KVCache, row: int) -> None:
        """Keep the row's first `len(keys)` blocks."""
        if 2 * cache.keys[:, row, :, :BLOCK].nbytes > self.store.budget:
            return
        # From the last to the first, so that of a prompt the end is forgotten before the beginning.
        for number in reversed(range(len(keys))):
            if self.store.get(keys[number]) is None:
                part = slice(number * BLOCK, (number + 1) * BLOCK)
                both = (cache.keys[:, row, :, part], cache.values[:, row, :, part])
                self.store.put(keys[number], torch.stack(both))


class Caches:
    """All that an engine keeps between requests, within `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.images: LRUCache[torch.Tensor] = LRUCache(int(budget * IMAGE_SHARE))
        self.prefixes = PrefixCache(budget - self.images.budget)

    def clear(self) -> None:
        """Forget everything."""
        self.images.clear()
        self.prefixes.store.clear()


@dataclass(frozen=True)
class PromptHashes:
    """By what the caches know a fused prompt.

    images: the key of each image. ends: where among the positions each one's vision tokens
    end. words: uint64 [positions, 5], what stands at each position: a token is its id after four
    zeros, a vision token its number after its image's key.
    """

    images: tuple[bytes, ...]
    ends: tuple[int, ...]
    words: NDArray[np.uint64]
    blocks: tuple[bytes, ...]

    @classmethod
    def of(
        cls, prompt: Prompt, images: Sequence[TiledImage], latents: int, *, instructed: bool
    ) -> "PromptHashes":
        """The keys of a prompt with its images.

        latents: vision tokens a tile. instructed: whether they depend on the prompt's text.
        """
        keys = tuple(image_key(image) for image in images)
        text = np.array(prompt.ids).tobytes() if instructed else b""
        ids, end, total = np.array(prompt.ids, dtype=np.uint64), 0, 0
        parts: list[NDArray[np.uint64]] = []
        ends: list[int] = []
        for (start, length), key, image in zip(prompt.spans, keys, images, strict=True):
            shown = np.empty((image.pixels.shape[0] * latents, 5), dtype=np.uint64)
            shown[:, :4] = np.frombuffer(hashlib.sha256(key + text).digest(), dtype=np.uint64)
            shown[:, 4] = np.arange(len(shown))
            parts += [_text_words(ids[end:start]), shown]
            total += start - end + len(shown)
            ends.append(total)
            end = start + length
        words = np.concatenate([*parts, _text_words(ids[end:])])
        return cls(keys, tuple(ends), words, tuple(_block_keys(words)))

    def continued(self, generated: Sequence[int]) -> list[bytes]:
        """The block keys of the prompt and the tokens that were generated after it."""
        new = _text_words(np.array(generated, dtype=np.uint64))
        return list(_block_keys(np.concatenate([self.words, new])))


def image_key(image: TiledImage) -> bytes:
    """A hash of all that the image's features depend on."""
    layout = (image.pixels.shape, image.columns, image.rows, image.image_size)
    digest = hashlib.sha256(repr(layout).encode())
    digest.update(image.pixels.data)
    return digest.digest()


def _text_words(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = np.zeros((len(ids), 5), dtype=np.uint64)
    words[:, 4] = ids
    return words


def _block_keys(words: NDArray[np.uint64]) -> Iterator[bytes]:
    """The key of each whole block."""
    key = b""
    for start in range(0, len(words) - BLOCK + 1, BLOCK):
        key = hashlib.sha256(key + words[start : start + BLOCK].tobytes()).digest()
        yield key
