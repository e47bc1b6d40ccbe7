"""Phi-3 decoder with xGen-MM's additional tokens.

Plain PyTorch: the reference implementation and the CPU path. What the tokens of a pass attend to
is an argument (`models/attention.py`). Parameter names are those of the released checkpoints
(`vlm.lang_model.*`). The additional tokens (`<image>` and two others) have their own embedding and
output rows, which the checkpoints store apart from the vocabulary's.
"""

import torch
from torch import nn
from torch.nn import functional as F

from xgenmm.config import DecoderConfig
from xgenmm.models.attention import Attend

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of the tokens' positions, from `rotary_angles`."""


class AdditionalEmbedding(nn.Embedding):
    """Token embedding; ids from `initial_vocab` on are rows of `additional_embedding`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.initial_vocab = config.initial_vocab
        self.additional_embedding = nn.Embedding(config.additional_tokens, config.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., hidden_size]."""
        is_additional = ids >= self.initial_vocab
        regular = super().forward(ids.masked_fill(is_additional, 0))
        additional = self.additional_embedding((ids - self.initial_vocab).clamp(min=0))
        return torch.where(is_additional[..., None], additional, regular)


class AdditionalLinear(nn.Linear):
    """Output layer: logits of the first `initial_vocab` ids, then of the additional tokens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.initial_vocab = config.initial_vocab
        self.additional_fc = nn.Linear(config.hidden_size, config.additional_tokens)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> [..., initial_vocab + additional_tokens]."""
        weight, bias = self.weight[: self.initial_vocab], self.bias[: self.initial_vocab]
        return torch.cat([F.linear(hidden, weight, bias), self.additional_fc(hidden)], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with rotary position embedding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden: torch.Tensor, rotary: Rotary, attend: Attend, layer: int
    ) -> torch.Tensor:
        """[..., t, hidden_size] -> the same shape."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (3, self.heads, -1))
        query, key = _rotate(qkv[..., :2, :, :], rotary).unbind(-3)
        return self.o_proj(attend(layer, query, key, qkv[..., 2, :, :]).flatten(-2))


class MLP(nn.Module):
    """SiLU-gated feed-forward, with the gate and up projections in one matrix."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, rotary: Rotary, attend: Attend, layer: int
    ) -> torch.Tensor:
        """[..., t, hidden_size] -> the same shape."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, attend, layer)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Phi3Model(nn.Module):
    """Embedding, layers and final norm, under the released names `model.*`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = AdditionalEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Phi3Decoder(nn.Module):
    """Embeddings -> hidden states; `lm_head` turns those into logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Phi3Model(config)
        self.lm_head = AdditionalLinear(config)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., hidden_size]."""
        return self.model.embed_tokens(ids)

    def forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Run the layers over new tokens; return their final hidden states, after the norm.

        Args:
            embeds: [..., t, hidden_size].
            positions: int64 [..., t].
            attend: stores the tokens' keys and values, and attends to all that they may see.
        """
        config, hidden = self.config, embeds
        rotary = rotary_angles(positions, config.head_dim, config.rope_theta, embeds.dtype)
        for number, layer in enumerate(self.model.layers):
            hidden = layer(hidden, rotary, attend, number)
        return self.model.norm(hidden)


def rotary_angles(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> Rotary:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, equation 34).

    positions: int64 [..., t]. Returns cosine and sine, [..., t, 1, 1, head_dim] each.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (pairs / head_dim)
    angle = positions[..., None] * frequency
    angle = torch.cat([angle, angle], dim=-1)[..., None, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of the last axis, as Phi-3 lays them out."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
