"""Which blocks of the KV cache belong to whom. Plain data, no torch.

A block that nobody owns any more keeps its contents and can be found by its hash until it is needed
for something else; the one unused for longest goes first (as vLLM's block pool).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Reference counts and hashes of the blocks 1 to `num_blocks`; block 0 is for padding.

    caching: whether blocks without an owner can be found again.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._caching = caching
        self._owners = [0] * (num_blocks + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._hashes: dict[int, bytes] = {}
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their hash, owned or not."""
        return len(self._by_hash)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks with the leading hashes, up to the first that is unknown."""
        found = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_unowned(self, blocks: Sequence[int]) -> int:
        """How many of these blocks have no owner."""
        return sum(self._owners[block] == 0 for block in blocks)

    def allocate(self) -> int:
        """Take the block unused for longest, whose contents are lost. Needs `num_free` > 0."""
        block, _ = self._free.popitem(last=False)
        block_hash = self._hashes.pop(block, None)
        if block_hash is not None:
            del self._by_hash[block_hash]
        self._owners[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of these blocks."""
        for block in blocks:
            self._owners[block] += 1
            self._free.pop(block, None)

    def is_shared(self, block: int) -> bool:
        """Whether a block has more than one owner."""
        return self._owners[block] > 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove an owner from each block of a sequence.

        The last block is the first to be reused, since a prefix is of no use without its beginning.
        """
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free[block] = None
                if block not in self._hashes:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, block_hash: bytes) -> None:
        """Let a block whose keys and values are computed be found by its hash.

        The first of several blocks of equal contents is the one that is found.
        """
        if self._caching and block not in self._hashes and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block
