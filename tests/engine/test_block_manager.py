"""Owners of the KV cache's blocks, and in which order blocks without one are reused."""

from collections.abc import Sequence

from xgenmm.engine.block_manager import BlockManager

HASHES = [b"a", b"b", b"c", b"d"]


def registered(blocks: BlockManager, hashes: Sequence[bytes]) -> list[int]:
    """Take a block for each hash and let it be found."""
    table = [blocks.allocate() for _ in hashes]
    for block, block_hash in zip(table, hashes, strict=True):
        blocks.register(block, block_hash)
    return table


def test_each_block_is_handed_out_once_and_the_padding_block_never() -> None:
    blocks = BlockManager(5)
    assert sorted(blocks.allocate() for _ in range(5)) == [1, 2, 3, 4, 5]
    assert blocks.num_free == 0


def test_prefix_is_found_up_to_the_first_difference() -> None:
    blocks = BlockManager(8)
    table = registered(blocks, HASHES)
    assert blocks.find(HASHES) == table
    assert blocks.find([b"a", b"b", b"x", b"d"]) == table[:2]
    assert blocks.find([b"x", *HASHES]) == blocks.find([]) == []
    assert blocks.num_cached == 4


def test_block_is_free_when_its_last_owner_releases_it() -> None:
    blocks = BlockManager(4)
    table = registered(blocks, HASHES[:2])
    blocks.share(table)
    assert [blocks.is_shared(block) for block in table] == [True, True]
    blocks.release(table)
    assert [blocks.is_shared(block) for block in table] == [False, False]
    assert (blocks.num_free, blocks.num_unowned(table)) == (2, 0)
    blocks.release(table)
    assert (blocks.num_free, blocks.num_unowned(table)) == (4, 2)
    assert blocks.find(HASHES) == table
    blocks.share(table)  # found again without being overwritten
    assert (blocks.num_free, blocks.num_unowned(table)) == (2, 0)


def test_least_recently_used_block_is_reused_first() -> None:
    blocks = BlockManager(3)
    a, b, c = registered(blocks, [b"a", b"b", b"c"])
    for block in (b, c, a):
        blocks.release([block])
    blocks.share([b])
    blocks.release([b])
    assert [blocks.allocate() for _ in range(3)] == [c, a, b]
    assert blocks.find([b"b"]) == []
    assert blocks.num_cached == 0


def test_end_of_a_prefix_is_reused_before_its_beginning() -> None:
    blocks = BlockManager(5)
    table = registered(blocks, HASHES)
    blocks.release(table)
    for known in (4, 3, 2):  # the first block taken has never been used
        blocks.allocate()
        assert blocks.find(HASHES) == table[:known]


def test_blocks_that_cannot_be_found_are_reused_before_those_that_can() -> None:
    blocks = BlockManager(4)
    known = registered(blocks, HASHES[:2])
    unknown = [blocks.allocate(), blocks.allocate()]
    blocks.release(known)
    blocks.release(unknown)
    assert {blocks.allocate(), blocks.allocate()} == set(unknown)
    assert blocks.find(HASHES) == known


def test_first_of_equal_blocks_is_found() -> None:
    blocks = BlockManager(4)
    (first,) = registered(blocks, [b"a"])
    (second,) = registered(blocks, [b"a"])
    assert blocks.find([b"a"]) == [first]
    blocks.release([first])
    blocks.release([second])
    assert blocks.find([b"a"]) == [first]
    assert blocks.num_cached == 1


def test_block_keeps_its_hash_until_it_is_reused() -> None:
    blocks = BlockManager(1)
    (block,) = registered(blocks, [b"a"])
    blocks.register(block, b"b")
    assert (blocks.find([b"a"]), blocks.find([b"b"])) == ([block], [])
    blocks.release([block])
    assert registered(blocks, [b"b"]) == [block]
    assert (blocks.find([b"a"]), blocks.find([b"b"])) == ([], [block])


def test_without_caching_no_block_is_found() -> None:
    blocks = BlockManager(2, caching=False)
    registered(blocks, [b"a"])
    assert (blocks.find([b"a"]), blocks.num_cached) == ([], 0)
