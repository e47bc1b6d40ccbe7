"""What the hashes of images and prompt blocks cover."""

from dataclasses import replace

import numpy as np
import pytest

from xgenmm.config import BLOCK_SIZE, ResamplerConfig
from xgenmm.engine.prompt_hashes import PromptHashes, image_hash
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage


def tiles(value: int = 0) -> TiledImage:
    return TiledImage(np.full((3, 4, 4, 3), value, dtype=np.uint8), 2, 1, (8, 4))


def hashes_of(prompt: Prompt, *images: TiledImage, instruction_aware: bool = False) -> PromptHashes:
    resampler = ResamplerConfig(
        num_latents=2 * BLOCK_SIZE // 3, text_tokens=256 if instruction_aware else 0
    )
    return PromptHashes.from_prompt(prompt, images, resampler)


def test_block_hashes_are_equal_up_to_the_first_difference() -> None:
    ids = tuple(range(4 * BLOCK_SIZE + 5))
    blocks = hashes_of(Prompt(ids, ())).blocks
    assert len(set(blocks)) == 4
    changed = (*ids[: 2 * BLOCK_SIZE + 3], 7, *ids[2 * BLOCK_SIZE + 4 :])
    others = hashes_of(Prompt(changed, ())).blocks
    assert others[:2] == blocks[:2]
    assert not set(others[2:]) & set(blocks)
    assert not set(hashes_of(Prompt((9, *ids[1:]), ())).blocks) & set(blocks)
    assert hashes_of(Prompt(ids[: BLOCK_SIZE - 1], ())).blocks == ()


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


def test_clip_has_the_hash_of_its_frames_in_order() -> None:
    prompt = Prompt((1, 5, 2), ((1, 1),))
    frames = [TiledImage(np.full((1, 4, 4, 3), i, dtype=np.uint8), 0, 0, (4, 4)) for i in range(3)]

    def clip_hashes(*frames: TiledImage) -> PromptHashes:
        return PromptHashes.from_prompt(prompt, frames, ResamplerConfig(), clip_tokens=BLOCK_SIZE)

    hashes = clip_hashes(*frames)
    assert hashes.image_ends == (1 + BLOCK_SIZE,) * 3
    assert len(hashes.positions) == 2 + BLOCK_SIZE
    others = [clip_hashes(*frames[::-1]), clip_hashes(*frames[:2])]
    assert len({one.clip for one in (hashes, *others)} | set(hashes.images)) == 6
    assert len({one.blocks for one in (hashes, *others)}) == 3


@pytest.mark.parametrize("prompt_tokens", [3, BLOCK_SIZE, BLOCK_SIZE + 3, 2 * BLOCK_SIZE])
def test_output_tokens_extend_the_block_hashes(prompt_tokens: int) -> None:
    ids = tuple(range(3 * BLOCK_SIZE))
    whole, begun = (hashes_of(Prompt(text, ())) for text in (ids, ids[:prompt_tokens]))
    assert begun.blocks_with_output(ids[prompt_tokens:]) == whole.blocks
    assert begun.blocks_with_output([]) == begun.blocks
