"""Hashes that identify the images, the clip and the prefix blocks of a prompt.

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

    images: one hash per image or frame.
    clip: of all frames in order; None if the images are not the frames of a clip.
    image_ends: for each image, the position after its last vision token; for each frame, after the
        last one of the clip.
    positions: uint64 [positions, 5], the content of each position. Text: four zeros and the token
        id. Vision token: the 256-bit hash of its image or clip and its index within it.
    blocks: one hash per whole block.
    """

    images: tuple[bytes, ...]
    clip: bytes | None
    image_ends: tuple[int, ...]
    positions: NDArray[np.uint64]
    blocks: tuple[bytes, ...]

    @classmethod
    def from_prompt(
        cls,
        prompt: Prompt,
        images: Sequence[TiledImage],
        resampler: ResamplerConfig,
        clip_tokens: int = 0,
    ) -> "PromptHashes":
        """Hash a prompt with its images.

        clip_tokens: of a video model: the images are the frames of one clip, which has as many
            vision tokens.

        Vision tokens of an instruction-aware resampler depend on the text of the prompt, so their
        positions cover it.
        """
        hashes = tuple(image_hash(image) for image in images)
        clip = None
        units = [
            (key, image.pixels.shape[0] * resampler.num_latents)
            for key, image in zip(hashes, images, strict=True)
        ]
        if clip_tokens and images:
            clip = hashlib.sha256(b"clip" + b"".join(hashes)).digest()
            units = [(clip, clip_tokens)]
        text = np.array(prompt.ids).tobytes() if resampler.text_tokens else b""
        ids, end, total = np.array(prompt.ids, dtype=np.uint64), 0, 0
        parts: list[NDArray[np.uint64]] = []
        ends: list[int] = []
        for (start, length), (key, count) in zip(prompt.spans, units, strict=True):
            vision = np.empty((count, 5), dtype=np.uint64)
            vision[:, :4] = np.frombuffer(hashlib.sha256(key + text).digest(), dtype=np.uint64)
            vision[:, 4] = np.arange(len(vision))
            parts += [_text_positions(ids[end:start]), vision]
            total += start - end + len(vision)
            ends.append(total)
            end = start + length
        positions = np.concatenate([*parts, _text_positions(ids[end:])])
        image_ends = tuple(ends if clip is None else ends * len(images))
        return cls(hashes, clip, image_ends, positions, tuple(_block_hashes(positions)))

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
