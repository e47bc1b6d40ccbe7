"""Temporal encoders: the latents of a clip's frames -> the latents of the clip.

BLIP-3-Video (arXiv 2410.16267), under the released parameter names
(`vlm.vision_tokenizer.temporal_encoder.*`). They run between the layers of the resampler and its
final norm and projection.
"""

from typing import cast

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from xgenmm.config import TemporalConfig
from xgenmm.models.resampler import feed_forward


class TokenLearner(nn.Module):
    """Pools any number of tokens to `num_tokens` weighted means (TokenLearner, arXiv 2106.11297).

    The weights come from normalized tokens, the means are of the tokens as they are.
    """

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = feed_forward(width, 2 * num_tokens, num_tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., n, width] -> [..., num_tokens, width]."""
        weights = self.mlp(self.norm(tokens)).softmax(dim=-2)
        return weights.mT @ tokens


class TokenLearnerEncoder(nn.Module):
    """One token learner over the tokens of all frames; it does not know their order."""

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.final_output = TokenLearner(width, num_tokens)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[frames, num_latents, width] -> [num_tokens, width]."""
        return self.final_output(latents.flatten(0, 1))


class SelfAttention(nn.Module):
    """Attention with a norm before it and no projection after it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[groups, n, width] -> the same shape; tokens attend to those of their group."""
        normed = self.norm(tokens)
        query, key, value = (
            rearrange(layer(normed), "groups n (heads dim) -> groups heads n dim", heads=self.heads)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(query, key, value)
        return rearrange(out, "groups heads n dim -> groups n (heads dim)")


class TokenTuringMachineUnit(nn.Module):
    """Updates the memory of each group with one new token (arXiv 2211.09119, section 3).

    `read_layer` is in the checkpoints but not used: a group is so small that all of it is read.
    """

    def __init__(self, config: TemporalConfig, width: int, num_latents: int) -> None:
        super().__init__()
        self.process_layers = nn.ModuleList(
            nn.ModuleList([SelfAttention(width, config.num_heads), feed_forward(width)])
            for _ in range(config.num_layers)
        )
        self.read_layer = TokenLearner(width, num_latents)
        self.write_layer = TokenLearner(width, config.memory_size)

    def forward(self, memory: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the new memory.

        memory: [groups, memory_size, width]. step: [groups, 1, width], the new tokens.
        """
        tokens = torch.cat([memory, step], dim=1)
        for layer in self.process_layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            tokens = tokens + attention(tokens)
            tokens = tokens + feed_forward(tokens)
        return self.write_layer(torch.cat([memory, tokens], dim=1))


class PositionCodes(nn.Module):
    """Sines and cosines of the index of a frame, interleaved.

    `inv_freq` is in the checkpoints but not read: rounded to bfloat16 it would move the codes of
    32 frames by up to 0.1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("inv_freq", self._frequencies())

    def forward(self, count: int, device: torch.device) -> torch.Tensor:
        """float32 [count, width]: the codes of frames 0 to count - 1."""
        indices = torch.arange(count, device=device, dtype=torch.float32)
        angles = indices[:, None] * self._frequencies(device)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)

    def _frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        exponents = torch.arange(0, self.width, 2, device=device, dtype=torch.float32) / self.width
        return 1 / 10000**exponents


class GroupedTokenTuringMachine(nn.Module):
    """Reads the frames in order; each latent has its own memory, which it does not share.

    The token of a latent is the mean of its memory after the last frame.
    """

    def __init__(self, config: TemporalConfig, width: int, num_latents: int) -> None:
        super().__init__()
        self.initial_memory = nn.Parameter(torch.randn(num_latents, config.memory_size, width))
        self.ttm_unit = TokenTuringMachineUnit(config, width, num_latents)
        self.pos_emb = PositionCodes(width)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[frames, num_latents, width] -> [num_latents, width]."""
        codes = self.pos_emb(len(latents), latents.device)
        steps = (latents + codes[:, None]).to(latents.dtype)  # added in float32
        memory: torch.Tensor = self.initial_memory
        for step in steps:
            memory = self.ttm_unit(memory, step[:, None])
        return memory.mean(dim=1)


def build_temporal_encoder(config: TemporalConfig, width: int, num_latents: int) -> nn.Module:
    """Build the configured temporal encoder on the current default device.

    It maps [frames, num_latents, width] to [tokens, width], for any number of frames.
    """
    if config.kind == "token_learner":
        return TokenLearnerEncoder(width, config.num_tokens)
    return GroupedTokenTuringMachine(config, width, num_latents)
