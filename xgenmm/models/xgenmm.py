"""XGenMM: tiles and a prompt in, logits out; composes tower, sampler and decoder.

Holds no state of a request; `engine.py` owns caches and the decode loop.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from xgenmm.config import XGenMMConfig
from xgenmm.models.image_features import normalize, padding_mask, regroup
from xgenmm.models.phi3 import KVCache, Phi3Decoder
from xgenmm.models.resampler import PerceiverResampler
from xgenmm.models.vision import build_tower
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage


def padded(length: int) -> int:
    """Up to how many positions a part of a prompt is padded, where they fit the cache.

    A library makes and keeps a kernel for every shape, so there are to be few.
    """
    return -(-length // 8) * 8


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
    """A vision-language model of any of the released families, on the current default device."""

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
        """Where the weights are."""
        return self.vlm.lang_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, which is that of all activations."""
        return self.vlm.lang_model.lm_head.weight.dtype

    def cache(self, rows: int, positions: int) -> KVCache:
        """An empty cache beside the weights, for `rows` sequences of at most `positions` tokens."""
        return KVCache.allocate(
            self.config.decoder, rows, positions, device=self.device, dtype=self.dtype
        )

    def prefill(self, prompts: Sequence[torch.Tensor], cache: KVCache) -> torch.Tensor:
        """Fused prompts [length, width], one for each row of the cache -> next-token logits.

        Rows may differ in length; each gets what it would get alone. Returns float32
        [rows, initial_vocab + additional].
        """
        return self.prefill_chunk(prompts, [0] * len(prompts), None, cache)

    @torch.inference_mode()
    def prefill_chunk(
        self,
        parts: Sequence[torch.Tensor],
        starts: Sequence[int],
        rows: Sequence[int] | None,
        cache: KVCache,
    ) -> torch.Tensor:
        """The next part of several fused prompts -> the logits after each part.

        Args:
            parts: [length, width] each.
            starts: how many positions of the row are in the cache already.
            rows: of the cache; None for the first ones. Where a padded row would pass the cache's
                end its padding goes to the last index, which then must not be in use.

        Returns float32 [rows, initial_vocab + additional].
        """
        device = self.device
        lengths = [part.shape[0] for part in parts]
        longest = max(lengths)
        taken = max(longest, min(padded(longest), cache.positions - max(starts)))
        embeds = torch.stack([F.pad(part, (0, 0, 0, taken - len(part))) for part in parts])
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(
            taken, device=device
        )
        hidden = self.decoder(
            embeds,
            positions.clamp(max=cache.positions - 1),
            cache,
            max(start + length for start, length in zip(starts, lengths, strict=True)),
            rows=None if rows is None else torch.tensor(rows, device=device),
            start=starts[0] if len(set(starts)) == 1 else None,
        )
        last = torch.tensor(lengths, device=device) - 1
        return self.logits(hidden[torch.arange(len(parts), device=device), last])

    @torch.inference_mode()
    def score_continuations(
        self, texts: Sequence[Sequence[int]], start: int, row: int, cache: KVCache
    ) -> list[torch.Tensor]:
        """Logits along several continuations of one row in one pass; none sees another.

        texts: token ids of each, not empty. start: the row's length, which stays what it is; the
            room behind it must hold all texts.

        Returns float32 [length of the text, initial_vocab + additional] each: row i is what
        follows its ids up to the i-th.
        """
        device = self.device
        ids = torch.tensor([token for text in texts for token in text], device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        branch = torch.arange(len(texts), device=device).repeat_interleave(lengths)
        first = (lengths.cumsum(0) - lengths)[branch]
        number = torch.arange(len(ids), device=device)
        positions = start + number - first
        length = start + len(ids)
        window = self.config.decoder.window_keys
        key_positions = torch.cat([torch.arange(start, device=device), positions])
        distance = positions[:, None] - key_positions
        own = torch.cat([branch.new_ones(len(ids), start).bool(), branch[:, None] == branch], dim=1)
        hidden = self.decoder(
            self.decoder.embed(ids)[None],
            positions[None],
            cache,
            length,
            rows=torch.tensor([row], device=device),
            indices=(start + number)[None],
            mask=(own & (distance >= 0) & (distance < window))[None, None],
        )
        return list(self.logits(hidden[0]).split([len(text) for text in texts]))

    @torch.inference_mode()
    def decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        length: int | None = None,
    ) -> torch.Tensor:
        """One decode step: the row's newest token at its position -> the next token's logits.

        Args:
            tokens, positions: int64 [rows].
            cache: of as many rows or more.
            length: keys to look at, above every position; by default all that the cache holds.

        Returns float32 [rows, initial_vocab + additional].
        """
        embeds = self.decoder.embed(tokens)[:, None]
        # Where the host may look at a position for nothing, a single row needs no mask.
        start = int(positions) if positions.device.type == "cpu" and len(positions) == 1 else None
        hidden = self.decoder(
            embeds, positions[:, None], cache, length or cache.positions, start=start
        )
        return self.logits(hidden[:, 0])

    def features(self, images: Sequence[TiledImage]) -> list[torch.Tensor]:
        """Encoder features of each image, [tiles, patches, width], regrouped for the sampler.

        All tiles of all images go through the tower as one batch.
        """
        if not images:
            return []
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in images]))
        tiles = normalize(pixels.to(self.device), self.config.tiling, self.dtype)
        features: torch.Tensor = self.vlm.vision_encoder(tiles)
        parts = features.split([image.pixels.shape[0] for image in images])
        return [
            regroup(part, image.columns, image.rows)
            for part, image in zip(parts, images, strict=True)
        ]

    def vision_tokens(
        self,
        images: Sequence[TiledImage],
        features: Sequence[torch.Tensor],
        prompt: Prompt | None = None,
    ) -> list[torch.Tensor]:
        """Vision tokens of each image, [tiles * num_latents, decoder width].

        prompt: what the instruction-aware sampler reads; the plain one never looks at it.
        """
        if not images:
            return []
        side = self.config.vision.grid
        masks = [padding_mask(one.columns, one.rows, one.image_size, side) for one in images]
        mask = torch.cat(masks).to(self.device)
        text = None
        if prompt is not None and self.config.resampler.text_tokens:
            text = self.embed_ids(prompt.ids)
        tokens: torch.Tensor = self.vlm.vision_tokenizer(torch.cat(list(features)), mask, text)
        parts = tokens.split([part.shape[0] for part in features])
        return [part.flatten(0, 1) for part in parts]

    @torch.inference_mode()
    def encode(
        self, images: Sequence[TiledImage], prompt: Prompt | None = None
    ) -> list[torch.Tensor]:
        """Images -> vision tokens: `features`, then `vision_tokens`."""
        return self.vision_tokens(images, self.features(images), prompt)

    def embed_ids(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids -> [length, decoder width]."""
        return self.decoder.embed(torch.tensor(ids, dtype=torch.long, device=self.device))

    @torch.inference_mode()
    def merge_multimodal_embeddings(
        self, prompt: Prompt, vision_tokens: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The prompt's embeddings, each image's run replaced by its vision tokens.

        Returns [positions, decoder width].
        """
        embeds = self.embed_ids(prompt.ids)
        parts, end = [], 0
        for (start, length), tokens in zip(prompt.spans, vision_tokens, strict=True):
            parts += [embeds[end:start], tokens.to(embeds.dtype)]
            end = start + length
        return torch.cat([*parts, embeds[end:]])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [..., width] -> float32 logits [..., initial_vocab + additional]."""
        logits: torch.Tensor = self.decoder.lm_head(hidden)
        return logits.float()
