"""XGenMM: vision tower, resampler and decoder composed into one model.

Stateless: callers own the KV cache and the decode loop.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from xgenmm.config import BLOCK_SIZE, XGenMMConfig
from xgenmm.models.attention import PagedAttention, Segment, decode_segment
from xgenmm.models.image_features import normalize, padding_mask, regroup
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.phi3 import Phi3Decoder
from xgenmm.models.resampler import PerceiverResampler
from xgenmm.models.temporal_encoder import build_temporal_encoder
from xgenmm.models.transfer import to_device
from xgenmm.models.vision import build_tower
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage


class _VLM(nn.Module):
    """The three parts under the released names."""

    def __init__(self, config: XGenMMConfig) -> None:
        super().__init__()
        self.vision_encoder = build_tower(config.vision)
        width, encoder = config.vision.hidden_size, None
        if config.temporal is not None:
            latents = config.resampler.num_latents
            encoder = build_temporal_encoder(config.temporal, width, latents)
        self.vision_tokenizer = PerceiverResampler(
            config.resampler, width, config.decoder.hidden_size, encoder
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

    def cache(self, num_blocks: int) -> KVCache:
        """Allocate a KV cache of `num_blocks` blocks, one of which is for padding."""
        return KVCache.allocate(
            self.config.decoder, num_blocks, device=self.device, dtype=self.dtype
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

        Returns [tiles * num_latents, decoder width] for each image. For a video model, images are
        the frames of one clip in order; returns [clip_tokens, decoder width] for the clip.
        """
        if not images:
            return []
        if self.config.temporal is not None:
            return [self.clip_tokens(self.frame_latents(features))]
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

    def frame_latents(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Resample the features of each frame, [1, patches, width], for `clip_tokens`.

        Returns [num_latents, width] for each frame.
        """
        return list(self.vlm.vision_tokenizer.resample(torch.cat(list(features))))

    def clip_tokens(self, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """The latents of a clip's frames, in order -> its vision tokens.

        Returns [clip_tokens, decoder width], for any number of frames.
        """
        return self.vlm.vision_tokenizer.to_tokens(torch.stack(list(latents)))

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

    @torch.inference_mode()
    def decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        block_tables: torch.Tensor,
        cache: KVCache,
        num_keys: int | None = None,
    ) -> torch.Tensor:
        """Run one decode step: the reference of the kernels' decode step.

        Args:
            tokens: int64 [rows], the newest token of each sequence.
            positions: int64 [rows], where they are; -1 is padding, whose logits are meaningless.
            block_tables: int [rows, max_blocks].
            num_keys: above every position; by default as many as fit the tables.

        Returns the logits of the next token, float32 [rows, initial_vocab + additional].
        """
        num_keys = num_keys or block_tables.shape[1] * BLOCK_SIZE
        window = self.config.decoder.window_keys
        segment = decode_segment(positions, block_tables, num_keys, window, self.dtype)
        return self.logits(self.forward(self.decoder.embed(tokens), [segment], cache))

    def forward(
        self, embeds: torch.Tensor, segments: Sequence[Segment], cache: KVCache
    ) -> torch.Tensor:
        """Run the decoder over a flat list of tokens, those of `segments` in order.

        Stores their keys and values. embeds: [tokens, width]. Returns the final hidden states, of
        the same shape.
        """
        positions = torch.cat([segment.positions for segment in segments])
        hidden: torch.Tensor = self.decoder(embeds, positions, PagedAttention(cache, segments))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [..., width] -> float32 logits [..., initial_vocab + additional]."""
        logits: torch.Tensor = self.decoder.lm_head(hidden)
        return logits.float()
