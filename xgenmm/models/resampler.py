"""Perceiver resampler: the patch features of a tile -> a fixed number of vision tokens.

Flamingo's resampler (arXiv 2204.14198, section 3.1.1) as used by BLIP-3 (arXiv 2408.08872), plain
(v1.5) and instruction-aware (v1), under the released parameter names (`vlm.vision_tokenizer.*`).
"""

from typing import cast

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from xgenmm.config import ResamplerConfig


class PerceiverAttention(nn.Module):
    """Cross-attention of the latents to the features and to the latents themselves."""

    def __init__(self, width: int, config: ResamplerConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, features: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Update the latents.

        Args:
            features: [tiles, n, width].
            latents: [tiles, m, width].
            mask: bool [tiles, n + m], False where a key is ignored.

        Returns [tiles, m, width].
        """
        features, latents = self.norm_media(features), self.norm_latents(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            rearrange(x, "tiles n (heads dim) -> tiles heads n dim", heads=self.heads)
            for x in (query, key, value)
        )
        attn_mask = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
        return self.to_out(rearrange(out, "tiles heads n dim -> tiles n (heads dim)"))


def feed_forward(width: int, inner: int | None = None, out: int | None = None) -> nn.Sequential:
    """Build norm, linear layer, GELU and linear layer; by default `inner` is 4 times the width."""
    inner = inner or 4 * width
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, out or width, bias=False),
    )


class PerceiverResampler(nn.Module):
    """Resamples each tile to `num_latents` vision tokens of the decoder's width.

    temporal_encoder: of a video model: pools the latents of all frames of a clip, see
        `temporal_encoder.py`.
    """

    def __init__(
        self,
        config: ResamplerConfig,
        width: int,
        decoder_width: int,
        temporal_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.num_latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, config), feed_forward(width)])
            for _ in range(config.depth)
        )
        self.temporal_encoder = temporal_encoder
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, decoder_width)
        if config.text_tokens:
            self.text_projection = nn.Sequential(
                nn.Linear(decoder_width, width), nn.GELU(), nn.Linear(width, width)
            )

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features -> vision tokens: `resample`, then `to_tokens`."""
        return self.to_tokens(self.resample(features, mask, text))

    def resample(
        self,
        features: torch.Tensor,
        mask: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Resample features to latents.

        Args:
            features: [tiles, n, width].
            mask: bool [tiles, n], False for padding. Used only if the configuration is `masked`:
                v1 instruct was trained with attention to padding. Latents are never masked.
            text: [length, decoder_width], embeddings of the prompt. The first `text_tokens` of
                them are projected and appended to the latents as additional queries in all layers
                (instruction-aware resampler only).

        Returns [tiles, num_latents, width].
        """
        latents = self.latents.expand(features.shape[0], -1, -1)
        if self.config.text_tokens and text is not None:
            instruction = self.text_projection(text[: self.config.text_tokens])
            instruction = instruction.expand(features.shape[0], -1, -1)
            latents = torch.cat([latents, instruction], dim=1)
        key_mask = None
        if self.config.masked and mask is not None:
            key_mask = F.pad(mask, (0, latents.shape[1]), value=True)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            latents = latents + attention(features, latents, key_mask)
            latents = latents + feed_forward(latents)
        return latents[:, : self.config.num_latents]

    def to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalize and project latents: [..., width] -> [..., decoder_width].

        A video model first pools those of its one clip: [frames, num_latents, width] ->
        [tokens, decoder_width].
        """
        if self.temporal_encoder is not None:
            latents = self.temporal_encoder(latents)
        tokens: torch.Tensor = self.projection(self.norm(latents))
        return tokens
