"""XGenMM: vision tower, resampler and decoder composed into one model.

Stateless: callers own the KV cache and the decode loop.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from xgenmm.config import XGenMMConfig
from xgenmm.models.image_features import normalize, padding_mask, regroup
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.phi3 import Phi3Decoder
from xgenmm.models.resampler import PerceiverResampler
from xgenmm.models.transfer import to_device
from xgenmm.models.vision import build_tower
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage

PREFILL_ALIGNMENT = 8


def padded_length(length: int) -> int:
    """Round the length of a prefill chunk up to a multiple of `PREFILL_ALIGNMENT`.

    Matrix libraries select and cache a kernel for each shape, so there should be few shapes.
    """
    return -(-length // PREFILL_ALIGNMENT) * PREFILL_ALIGNMENT


class _VLM(nn.Module):
    """The three parts under the released names."""

    def __init__(self, config: XGenMMConfig) -> None:
        super().__init__()
        self.vision_encoder = build_tower(config.vision)
        self.vision_tokenizer = PerceiverResampler(
            config.resampler, config.vision.hidden_size, config.decoder.hidden_size
        )
        self.lang_model = Phi3Decoder(config.decoder)


class XGenMM(nn.Module):
    """The vision-language model of any released family, on the current default device."""

    def __init__(self, config: XGenMMConfig) -> None:
        super().__init__()
        self.config = config
        self.vlm = _VLM(config)

    @property
    def decoder(self) -> Phi3Decoder:
        """The language model."""
        return self.vlm.lang_model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vlm.lang_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of all activations."""
        return self.vlm.lang_model.lm_head.weight.dtype

    def cache(self, rows: int, max_length: int) -> KVCache:
        """Allocate a cache for `rows` sequences of at most `max_length` tokens."""
        return KVCache.allocate(
            self.config.decoder, rows, max_length, device=self.device, dtype=self.dtype
        )

    def features(self, images: Sequence[TiledImage]) -> list[torch.Tensor]:
        """Encode all tiles as one batch.

        Returns the features of each image, [tiles, patches, width], regrouped for the resampler.
        """
        if not images:
            return []
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in images]))
        tiles = normalize(to_device(pixels, self.device), self.config.tiling, self.dtype)
        features: torch.Tensor = self.vlm.vision_encoder(tiles)
        per_image = features.split([image.pixels.shape[0] for image in images])
        return [
            regroup(tile_features, image.columns, image.rows)
            for tile_features, image in zip(per_image, images, strict=True)
        ]

    def vision_tokens(
        self,
        images: Sequence[TiledImage],
        features: Sequence[torch.Tensor],
        prompt: Prompt | None = None,
    ) -> list[torch.Tensor]:
        """Resample the features of each image to vision tokens.

        prompt: used by the instruction-aware resampler only.

        Returns [tiles * num_latents, decoder width] for each image.
        """
        if not images:
            return []
        side = self.config.vision.grid
        masks = [
            padding_mask(image.columns, image.rows, image.image_size, side) for image in images
        ]
        mask = to_device(torch.cat(masks), self.device)
        text = None
        if prompt is not None and self.config.resampler.text_tokens:
            text = self.embed_ids(prompt.ids)
        tokens: torch.Tensor = self.vlm.vision_tokenizer(torch.cat(list(features)), mask, text)
        per_image = tokens.split([tile_features.shape[0] for tile_features in features])
        return [tile_tokens.flatten(0, 1) for tile_tokens in per_image]

    @torch.inference_mode()
    def encode(
        self, images: Sequence[TiledImage], prompt: Prompt | None = None
    ) -> list[torch.Tensor]:
        """Compute the vision tokens of images: `features`, then `vision_tokens`."""
        return self.vision_tokens(images, self.features(images), prompt)

    def embed_ids(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids -> [length, decoder width]."""
        return self.decoder.embed(to_device(torch.tensor(ids, dtype=torch.long), self.device))

    @torch.inference_mode()
    def merge_multimodal_embeddings(
        self, prompt: Prompt, vision_tokens: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Embed the prompt, with each image's span replaced by its vision tokens.

        Returns [positions, decoder width].
        """
        embeds = self.embed_ids(prompt.ids)
        parts, end = [], 0
        for (start, length), tokens in zip(prompt.spans, vision_tokens, strict=True):
            parts += [embeds[end:start], tokens.to(embeds.dtype)]
            end = start + length
        return torch.cat([*parts, embeds[end:]])

    def prefill(self, prompts: Sequence[torch.Tensor], cache: KVCache) -> torch.Tensor:
        """Prefill embedded prompts, [length, width] each, into the first rows of an empty cache.

        Prompts may differ in length; padding does not change the result. Returns the logits of the
        next token, float32 [rows, initial_vocab + additional].
        """
        return self.prefill_chunk(prompts, [0] * len(prompts), None, cache)

    @torch.inference_mode()
    def prefill_chunk(
        self,
        chunks: Sequence[torch.Tensor],
        starts: Sequence[int],
        rows: Sequence[int] | None,
        cache: KVCache,
    ) -> torch.Tensor:
        """Prefill the next chunk of each of several embedded prompts.

        Args:
            chunks: [length, width] each.
            starts: number of positions already in the cache, for each row.
            rows: rows of the cache; None for the first ones. Padding beyond the end of a row
                overwrites its last index, which then must not be in use.

        Returns the logits after each chunk, float32 [rows, initial_vocab + additional].
        """
        device = self.device
        lengths = [chunk.shape[0] for chunk in chunks]
        longest = max(lengths)
        padded = max(longest, min(padded_length(longest), cache.max_length - max(starts)))
        embeds = torch.stack([F.pad(chunk, (0, 0, 0, padded - len(chunk))) for chunk in chunks])
        first_rows = range(len(chunks))
        indices = torch.tensor([starts, lengths, first_rows if rows is None else rows])
        start_of, length_of, row_of = to_device(indices, device)  # one copy for all three
        positions = start_of[:, None] + torch.arange(padded, device=device)
        hidden = self.decoder(
            embeds,
            positions.clamp(max=cache.max_length - 1),
            cache,
            max(start + length for start, length in zip(starts, lengths, strict=True)),
            rows=None if rows is None else row_of,
            start=starts[0] if len(set(starts)) == 1 else None,
        )
        return self.logits(hidden[torch.arange(len(chunks), device=device), length_of - 1])

    @torch.inference_mode()
    def decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        length: int | None = None,
    ) -> torch.Tensor:
        """Run one decode step for the first rows of the cache.

        Args:
            tokens, positions: the newest token of each row and its position, int64 [rows].
            length: number of cached keys to consider, above every position; by default all.

        Returns the logits of the next token, float32 [rows, initial_vocab + additional].
        """
        embeds = self.decoder.embed(tokens)[:, None]
        # On a CPU, reading the position costs nothing and saves the mask for a single row.
        start = int(positions) if positions.device.type == "cpu" and len(positions) == 1 else None
        hidden = self.decoder(
            embeds, positions[:, None], cache, length or cache.max_length, start=start
        )
        return self.logits(hidden[:, 0])

    @torch.inference_mode()
    def score_continuations(
        self, continuations: Sequence[Sequence[int]], start: int, row: int, cache: KVCache
    ) -> list[torch.Tensor]:
        """Compute the logits along several continuations of one row, in one pass.

        All continuations are written after the end of the row, which must have room for them, and
        none attends to another. The row itself is unchanged.

        Args:
            continuations: token ids, at least one each.
            start: length of the row.

        Returns for each continuation float32 [its length, initial_vocab + additional]; row i holds
        the logits of the token after its ids 0 to i.
        """
        device = self.device
        ids = [token for tokens in continuations for token in tokens]
        lengths = [len(tokens) for tokens in continuations]
        positions, mask = _continuation_mask(
            to_device(torch.tensor(lengths), device), start, self.config.decoder.window_keys
        )
        hidden = self.decoder(
            self.embed_ids(ids)[None],
            positions[None],
            cache,
            start + len(ids),
            rows=to_device(torch.tensor([row]), device),
            indices=(start + torch.arange(len(ids), device=device))[None],
            mask=mask[None, None],
        )
        return list(self.logits(hidden[0]).split(lengths))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [..., width] -> float32 logits [..., initial_vocab + additional]."""
        logits: torch.Tensor = self.decoder.lm_head(hidden)
        return logits.float()


def _continuation_mask(
    lengths: torch.Tensor, start: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and attention mask of several continuations of one prefix, side by side.

    lengths: int64 [continuations]. start: length of the prefix.

    Returns int64 [t] and bool [t, start + t] for the t tokens of all continuations: a token
    attends to the prefix and to its own continuation up to itself, within the window.
    """
    device = lengths.device
    owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    first = (lengths.cumsum(0) - lengths)[owner]
    positions = start + torch.arange(len(owner), device=device) - first
    key_positions = torch.cat([torch.arange(start, device=device), positions])
    distance = positions[:, None] - key_positions
    prefix = owner.new_ones(len(owner), start).bool()
    same_continuation = torch.cat([prefix, owner[:, None] == owner], dim=1)
    return positions, same_continuation & (distance >= 0) & (distance < window)
