"""Hashes that identify the images and the prefix blocks of a prompt.

A block's hash covers every position up to the block's end, image content included, so equal hashes
mean equal prefixes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xgenmm.config import BLOCK_SIZE, ResamplerConfig
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage


@dataclass(frozen=True)
class PromptHashes:
    """The hashes of a prompt with its images.

    images: one hash per image.
    image_ends: for each image, the position after its last vision token.
    positions: uint64 [positions, 5], the content of each position. Text: four zeros and the token
        id. Vision token: the 256-bit hash of its image and its index within the image.
    blocks: one hash per whole block.
    """

    images: tuple[bytes, ...]
    image_ends: tuple[int, ...]
    positions: NDArray[np.uint64]
    blocks: tuple[bytes, ...]

    @classmethod
    def from_prompt(
        cls, prompt: Prompt, images: Sequence[TiledImage], resampler: ResamplerConfig
    ) -> "PromptHashes":
        """Hash a prompt with its images.

        Vision tokens of an instruction-aware resampler depend on the text of the prompt, so their
        positions cover it.
        """
        hashes = tuple(image_hash(image) for image in images)
        text = np.array(prompt.ids).tobytes() if resampler.text_tokens else b""
        ids, end, total = np.array(prompt.ids, dtype=np.uint64), 0, 0
        parts: list[NDArray[np.uint64]] = []
        image_ends: list[int] = []
        for (start, length), key, image in zip(prompt.spans, hashes, images, strict=True):
            vision = np.empty((image.pixels.shape[0] * resampler.num_latents, 5), dtype=np.uint64)
            vision[:, :4] = np.frombuffer(hashlib.sha256(key + text).digest(), dtype=np.uint64)
            vision[:, 4] = np.arange(len(vision))
            parts += [_text_positions(ids[end:start]), vision]
            total += start - end + len(vision)
            image_ends.append(total)
            end = start + length
        positions = np.concatenate([*parts, _text_positions(ids[end:])])
        return cls(hashes, tuple(image_ends), positions, tuple(_block_hashes(positions)))

    def blocks_with_output(self, output_token_ids: Sequence[int]) -> tuple[bytes, ...]:
        """Hashes of the whole blocks of the prompt followed by these output tokens."""
        output = _text_positions(np.array(output_token_ids, dtype=np.uint64))
        rest = np.concatenate([self.positions[len(self.blocks) * BLOCK_SIZE :], output])
        return (*self.blocks, *_block_hashes(rest, self.blocks[-1] if self.blocks else b""))


def image_hash(image: TiledImage) -> bytes:
    """A hash of everything that the image's features depend on."""
    layout = (image.pixels.shape, image.columns, image.rows, image.image_size)
    digest = hashlib.sha256(repr(layout).encode())
    digest.update(image.pixels.data)
    return digest.digest()


def _text_positions(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    positions = np.zeros((len(ids), 5), dtype=np.uint64)
    positions[:, 4] = ids
    return positions


def _block_hashes(positions: NDArray[np.uint64], digest: bytes = b"") -> Iterator[bytes]:
    """digest: the hash of everything before `positions`."""
    for start in range(0, len(positions) - BLOCK_SIZE + 1, BLOCK_SIZE):
        block = positions[start : start + BLOCK_SIZE].tobytes()
        digest = hashlib.sha256(digest + block).digest()
        yield digest
