"""Rows of token ids, labels and images -> one padded batch of decoder inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from xgenmm.models.attention import sliding_window_mask
from xgenmm.models.transfer import to_device
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tiling import TiledImage

IGNORED = -100
"""Label of a token that is not learned."""


@dataclass(frozen=True)
class Row:
    """One sample: each `<image>` among its ids stands for the next of its images.

    ids, labels: of equal length; a label is the token itself or `IGNORED`.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[TiledImage, ...] = ()


@dataclass(frozen=True)
class SpecialIds:
    """Tokens that the loss never counts; padding is hidden from attention too, also within a row.

    Attributes:
        pad: `<pad>`.
        image: `<image>`.
        additional: all ids with an embedding row of their own, `image` among them.
    """

    pad: int
    image: int
    additional: tuple[int, ...]

    def learned(self, labels: Sequence[int]) -> list[int]:
        """Return the labels that the loss counts, with `IGNORED` in place of the others."""
        excluded = {self.pad, *self.additional}
        return [IGNORED if label in excluded else label for label in labels]


@dataclass(frozen=True)
class Inputs:
    """What the decoder gets, padded on the right to the longest row.

    Attributes:
        embeds: [rows, t, width].
        visible: bool [rows, 1, t, t], True where a token attends to a key.
        targets: int64 [rows, t], the token that each position predicts, or `IGNORED`.
    """

    embeds: torch.Tensor
    visible: torch.Tensor
    targets: torch.Tensor


def count_labels(rows: Sequence[Row], special: SpecialIds) -> int:
    """Return how many labels the loss counts; a row's first token is predicted from nothing."""
    return sum(label != IGNORED for row in rows for label in special.learned(row.labels)[1:])


def has_images(rows: Sequence[Row], special: SpecialIds) -> bool:
    """Whether the vision tokens of an image are among the inputs of a batch."""
    return any(special.image in row.ids for row in rows)


def embed_rows(
    model: XGenMM, rows: Sequence[Row], special: SpecialIds, *, always_resample: bool = False
) -> Inputs:
    """Embed rows, each `<image>` replaced by the vision tokens of its image.

    A batch without images does not use the resampler, which then gets no gradient at all; with
    `always_resample` it resamples a blank tile and gets a gradient of 0. Images that no `<image>`
    stands for are not encoded.

    Raises ValueError if a row has fewer images than `<image>`.
    """
    images = [image for row in rows for image in _used_images(row, special)]
    if always_resample and not images:
        images = [_blank_image(model.config.vision.image_size)]
    with torch.no_grad():  # the vision tower is frozen
        features = model.features(images)
    vision_tokens = iter(model.vision_tokens(images, features))
    fused = [_embed_row(model, row, special, vision_tokens) for row in rows]
    unused = [0.0 * tokens.sum() for tokens in vision_tokens]
    length = max(len(embeds) for embeds, _, _ in fused)

    def stack(index: int, value: float) -> torch.Tensor:
        parts = [parts[index] for parts in fused]
        padded = [
            F.pad(part, (0, 0) * (part.dim() - 1) + (0, length - len(part)), value=value)
            for part in parts
        ]
        return torch.stack(padded)

    positions = torch.arange(length, device=model.device)
    window = sliding_window_mask(positions, positions, model.config.decoder.window_keys)
    is_key = stack(1, False)
    visible = window & is_key[:, None, :]
    # A token without any key attends to itself: the gradient of an empty softmax is NaN.
    itself = torch.eye(length, dtype=torch.bool, device=model.device)
    visible |= itself & ~visible.any(-1, keepdim=True)
    targets = F.pad(stack(2, IGNORED), (0, 1), value=IGNORED)[:, 1:]
    return Inputs(sum(unused, stack(0, 0.0)), visible[:, None], targets)


def _blank_image(side: int) -> TiledImage:
    return TiledImage(np.zeros((1, side, side, 3), np.uint8), 0, 0, (side, side))


def _used_images(row: Row, special: SpecialIds) -> Sequence[TiledImage]:
    count = row.ids.count(special.image)
    if count > len(row.images):
        raise ValueError(f"a row has {count} <image>, but {len(row.images)} images; add images")
    return row.images[:count]


def _embed_row(
    model: XGenMM, row: Row, special: SpecialIds, vision_tokens: Iterator[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings [t, width], whether each is a key, and the labels, both [t]."""
    ids = to_device(torch.tensor(row.ids, dtype=torch.long), model.device)
    labels = to_device(torch.tensor(special.learned(row.labels)), model.device)
    text, is_key = model.decoder.embed(ids), ids != special.pad
    embeds, keys, targets, end = [], [], [], 0
    for place in (i for i, token in enumerate(row.ids) if token == special.image):
        tokens = next(vision_tokens)
        embeds += [text[end:place], tokens.to(text.dtype)]
        keys += [is_key[end:place], is_key.new_ones(len(tokens))]
        targets += [labels[end:place], labels.new_full((len(tokens),), IGNORED)]
        end = place + 1
    return (
        torch.cat([*embeds, text[end:]]),
        torch.cat([*keys, is_key[end:]]),
        torch.cat([*targets, labels[end:]]),
    )
