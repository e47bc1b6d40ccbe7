"""What is kept between requests: budgets, order of forgetting, and keys that cover everything."""

from dataclasses import replace

import numpy as np
import torch

from xgenmm.config import DecoderConfig
from xgenmm.engine.prefix_cache import BLOCK, LRUCache, PrefixCache, PromptHashes, image_key
from xgenmm.models.kv_cache import KVCache
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage

CONFIG = DecoderConfig(hidden_size=8, num_layers=2, num_heads=2)


def tensor(kilobytes: int) -> torch.Tensor:
    return torch.zeros(kilobytes * 256)


def filled(rows: int, positions: int) -> KVCache:
    cache = KVCache.allocate(
        CONFIG, rows, positions, device=torch.device("cpu"), dtype=torch.float32
    )
    torch.manual_seed(0)
    cache.keys.normal_()
    cache.values.normal_()
    return cache


def tiles(value: int = 0) -> TiledImage:
    return TiledImage(np.full((3, 4, 4, 3), value, dtype=np.uint8), 2, 1, (8, 4))


def keys_of(prompt: Prompt, *images: TiledImage, instructed: bool = False) -> PromptHashes:
    return PromptHashes.of(prompt, images, 2 * BLOCK // 3, instructed=instructed)


def test_store_forgets_what_was_used_longest_ago() -> None:
    store = LRUCache[torch.Tensor](10 * 1024)
    for name in (b"a", b"b", b"c"):
        store.put(name, tensor(3))
    assert store.get(b"a") is not None  # now b is the oldest
    store.put(b"d", tensor(3))
    assert [name for name in (b"a", b"b", b"c", b"d") if name in store] == [b"a", b"c", b"d"]
    assert store.used == 9 * 1024
    store.put(b"huge", tensor(11))
    assert b"huge" not in store
    store.clear()
    assert (len(store), store.used, store.get(b"a")) == (0, 0, None)


def test_prefix_is_restored_exactly_as_far_as_it_is_the_same() -> None:
    cache, prefixes = filled(2, 5 * BLOCK), PrefixCache(1 << 20)
    ids = tuple(range(4 * BLOCK + 5))
    keys = keys_of(Prompt(ids, ())).blocks
    assert len(keys) == 4
    prefixes.save(keys, cache, 0)
    before = cache.keys.clone()
    assert prefixes.restore(keys, cache, 1) == 4 * BLOCK
    assert torch.equal(cache.keys[:, 1, :, : 4 * BLOCK], before[:, 0, :, : 4 * BLOCK])
    assert torch.equal(cache.values[:, 1, :, : 4 * BLOCK], cache.values[:, 0, :, : 4 * BLOCK])
    assert torch.equal(cache.keys[:, 1, :, 4 * BLOCK :], before[:, 1, :, 4 * BLOCK :])

    other = (*ids[: 2 * BLOCK + 3], 7, *ids[2 * BLOCK + 4 :])
    assert prefixes.restore(keys_of(Prompt(other, ())).blocks, cache, 1) == 2 * BLOCK
    assert prefixes.restore(keys_of(Prompt((9, *ids[1:]), ())).blocks, cache, 1) == 0


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    cache = filled(2, 4 * BLOCK)
    block = 2 * cache.keys[:, 0, :, :BLOCK].nbytes
    prefixes = PrefixCache(3 * block)
    keys = keys_of(Prompt(tuple(range(4 * BLOCK)), ())).blocks
    prefixes.save(keys, cache, 0)
    assert prefixes.restore(keys, cache, 1) == 3 * BLOCK


def test_image_key_covers_pixels_and_tiling() -> None:
    known = {
        image_key(one)
        for one in (
            tiles(),
            tiles(1),
            replace(tiles(), columns=1, rows=2),
            replace(tiles(), image_size=(9, 4)),
            TiledImage(np.zeros((3, 4, 12, 1), dtype=np.uint8), 2, 1, (8, 4)),
        )
    }
    assert len(known) == 5
    assert image_key(tiles()) in known


def test_prompt_keys_cover_images_in_their_places() -> None:
    ids = tuple(range(100, 100 + BLOCK))
    prompt = Prompt((*ids[:3], 5, *ids[3:]), ((3, 1),))
    keys = keys_of(prompt, tiles())
    count = 3 * (2 * BLOCK // 3)
    assert keys.ends == (3 + count,)
    assert len(keys.words) == BLOCK + count
    assert keys.blocks == keys_of(prompt, tiles()).blocks
    assert keys.blocks[0] != keys_of(prompt, tiles(1)).blocks[0]
    # A text of the same length whose ids are the numbers of vision tokens is not an image.
    text = Prompt((*ids[:3], *range(count), *ids[3:]), ())
    assert keys_of(text).blocks[0] != keys.blocks[0]
    moved = Prompt((*ids[:4], 5, *ids[4:]), ((4, 1),))
    assert keys_of(moved, tiles()).blocks[0] != keys.blocks[0]


def test_what_depends_on_the_question_is_known_by_the_whole_prompt() -> None:
    ids = tuple(range(2 * BLOCK))
    one, other = (Prompt((5, *ids, last), ((0, 1),)) for last in (1, 2))
    assert keys_of(one, tiles()).blocks[:2] == keys_of(other, tiles()).blocks[:2]
    instructed = [keys_of(prompt, tiles(), instructed=True) for prompt in (one, other)]
    assert instructed[0].blocks[0] != instructed[1].blocks[0]
    assert instructed[0].images == instructed[1].images


def test_generated_tokens_continue_the_keys() -> None:
    ids = tuple(range(2 * BLOCK))
    whole = keys_of(Prompt(ids, ()))
    begun = keys_of(Prompt(ids[: BLOCK + 3], ()))
    assert tuple(begun.continued(ids[BLOCK + 3 :])) == whole.blocks
