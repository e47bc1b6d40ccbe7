"""Caches shared by requests: limits, eviction order, and what the hashes cover."""

from dataclasses import replace

import numpy as np
import torch

from xgenmm.config import DecoderConfig, ResamplerConfig
from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.prefix_cache import PrefixCache
from xgenmm.engine.prompt_hashes import BLOCK_SIZE, PromptHashes, image_hash
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


def hashes_of(prompt: Prompt, *images: TiledImage, instruction_aware: bool = False) -> PromptHashes:
    resampler = ResamplerConfig(
        num_latents=2 * BLOCK_SIZE // 3, text_tokens=256 if instruction_aware else 0
    )
    return PromptHashes.from_prompt(prompt, images, resampler)


def test_least_recently_used_item_is_evicted() -> None:
    cache = LRUCache[torch.Tensor](10 * 1024)
    for name in (b"a", b"b", b"c"):
        cache.put(name, tensor(3))
    assert cache.get(b"a") is not None  # now b is the least recently used
    cache.put(b"d", tensor(3))
    assert [name for name in (b"a", b"b", b"c", b"d") if name in cache] == [b"a", b"c", b"d"]
    assert cache.used_bytes == 9 * 1024
    cache.put(b"huge", tensor(11))
    assert b"huge" not in cache
    cache.clear()
    assert (len(cache), cache.used_bytes, cache.get(b"a")) == (0, 0, None)


def test_prefix_is_restored_up_to_the_first_difference() -> None:
    cache, prefixes = filled(2, 5 * BLOCK_SIZE), PrefixCache(1 << 20)
    ids = tuple(range(4 * BLOCK_SIZE + 5))
    hashes = hashes_of(Prompt(ids, ())).blocks
    assert len(hashes) == 4
    prefixes.save(hashes, cache, 0)
    before = cache.keys.clone()
    assert prefixes.restore(hashes, cache, 1) == 4 * BLOCK_SIZE
    assert torch.equal(cache.keys[:, 1, :, : 4 * BLOCK_SIZE], before[:, 0, :, : 4 * BLOCK_SIZE])
    assert torch.equal(
        cache.values[:, 1, :, : 4 * BLOCK_SIZE], cache.values[:, 0, :, : 4 * BLOCK_SIZE]
    )
    assert torch.equal(cache.keys[:, 1, :, 4 * BLOCK_SIZE :], before[:, 1, :, 4 * BLOCK_SIZE :])

    other = (*ids[: 2 * BLOCK_SIZE + 3], 7, *ids[2 * BLOCK_SIZE + 4 :])
    assert prefixes.restore(hashes_of(Prompt(other, ())).blocks, cache, 1) == 2 * BLOCK_SIZE
    assert prefixes.restore(hashes_of(Prompt((9, *ids[1:]), ())).blocks, cache, 1) == 0


def test_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    cache = filled(2, 4 * BLOCK_SIZE)
    block = 2 * cache.keys[:, 0, :, :BLOCK_SIZE].nbytes
    prefixes = PrefixCache(3 * block)
    hashes = hashes_of(Prompt(tuple(range(4 * BLOCK_SIZE)), ())).blocks
    prefixes.save(hashes, cache, 0)
    assert prefixes.restore(hashes, cache, 1) == 3 * BLOCK_SIZE


def test_image_hash_covers_pixels_and_tiling() -> None:
    hashes = {
        image_hash(one)
        for one in (
            tiles(),
            tiles(1),
            replace(tiles(), columns=1, rows=2),
            replace(tiles(), image_size=(9, 4)),
            TiledImage(np.zeros((3, 4, 12, 1), dtype=np.uint8), 2, 1, (8, 4)),
        )
    }
    assert len(hashes) == 5
    assert image_hash(tiles()) in hashes


def test_block_hashes_cover_images_and_their_positions() -> None:
    ids = tuple(range(100, 100 + BLOCK_SIZE))
    prompt = Prompt((*ids[:3], 5, *ids[3:]), ((3, 1),))
    hashes = hashes_of(prompt, tiles())
    count = 3 * (2 * BLOCK_SIZE // 3)
    assert hashes.image_ends == (3 + count,)
    assert len(hashes.positions) == BLOCK_SIZE + count
    assert hashes.blocks == hashes_of(prompt, tiles()).blocks
    assert hashes.blocks[0] != hashes_of(prompt, tiles(1)).blocks[0]
    # Text whose ids equal the indices of the vision tokens does not collide with the image.
    text = Prompt((*ids[:3], *range(count), *ids[3:]), ())
    assert hashes_of(text).blocks[0] != hashes.blocks[0]
    moved = Prompt((*ids[:4], 5, *ids[4:]), ((4, 1),))
    assert hashes_of(moved, tiles()).blocks[0] != hashes.blocks[0]


def test_instruction_aware_vision_tokens_depend_on_the_whole_prompt() -> None:
    ids = tuple(range(2 * BLOCK_SIZE))
    one, other = (Prompt((5, *ids, last), ((0, 1),)) for last in (1, 2))
    assert hashes_of(one, tiles()).blocks[:2] == hashes_of(other, tiles()).blocks[:2]
    aware = [hashes_of(prompt, tiles(), instruction_aware=True) for prompt in (one, other)]
    assert aware[0].blocks[0] != aware[1].blocks[0]
    assert aware[0].images == aware[1].images


def test_output_tokens_extend_the_block_hashes() -> None:
    ids = tuple(range(2 * BLOCK_SIZE))
    whole = hashes_of(Prompt(ids, ()))
    begun = hashes_of(Prompt(ids[: BLOCK_SIZE + 3], ()))
    assert tuple(begun.blocks_with_output(ids[BLOCK_SIZE + 3 :])) == whole.blocks
