"""Phi-3 decoder with a static KV cache and xGen-MM's additional tokens.

Plain PyTorch: the reference implementation and the CPU path. Parameter names are those of the
released checkpoints (`vlm.lang_model.*`). The additional tokens (`<image>` and two others) have
their own embedding and output rows, which the checkpoints store apart from the vocabulary's.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from xgenmm.config import DecoderConfig
from xgenmm.models.kv_cache import CacheView, KVCache


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


@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs to know about one forward pass; the same for every layer.

    Attributes:
        rotary: cosine and sine of the tokens' positions, from `rotary_angles`.
        mask: bool [batch, 1, t, keys], True where a token attends to a key; None means all keys.
        is_causal: each token attends to itself and to the tokens before it in this pass. The cache
            is then written but not read.
        cache: None for a pass without a cache, whose tokens attend to one another only.
    """

    rotary: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    is_causal: bool = False
    cache: CacheView | None = None


class Attention(nn.Module):
    """Multi-head attention with rotary position embedding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, inputs: AttentionInputs, layer: int) -> torch.Tensor:
        """[batch, t, hidden_size] -> the same shape; writes keys and values to the cache."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (3, self.heads, -1))
        query, key = _rotate(qkv[:, :, :2], inputs.rotary).transpose(1, 3).unbind(2)
        value = qkv[:, :, 2].transpose(1, 2)  # all three are [batch, heads, t, head_dim]
        if inputs.cache is not None:
            inputs.cache.write(layer, key, value)
            if not inputs.is_causal:
                key, value = inputs.cache.read(layer)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=inputs.mask, is_causal=inputs.is_causal
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


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

    def forward(self, hidden: torch.Tensor, inputs: AttentionInputs, layer: int) -> torch.Tensor:
        """[batch, t, hidden_size] -> the same shape."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), inputs, layer)
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
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        length: int,
        *,
        rows: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        start: int | None = None,
    ) -> torch.Tensor:
        """Run prefill or decode: write keys and values to the cache, return final hidden states.

        Args:
            embeds: [batch, t, hidden_size].
            positions: int64 [batch, t]. Padding at the end of a row has the positions that follow;
                later tokens overwrite it before anything attends to it.
            cache: of at least `batch` rows.
            length: number of cached keys to consider, above every index. An int, so that the host
                need not wait for the device.
            rows: int64 [batch], rows of the cache; by default the first ones, which saves a copy.
            indices: int64 [batch, t], where in the row the keys go; by default at `positions`.
            mask: bool [batch, 1, t, length], True where a token attends to a key; by default the
                sliding window.
            start: the first position, if every row's positions are start, start + 1, ... A hint
                that saves building the mask; the result is the same without it.

        Returns:
            [batch, t, hidden_size], after the final norm.
        """
        readable, is_causal = slice(length), False
        if mask is None:
            mask, readable, is_causal = self._window(positions, length, start)
        batch = embeds.shape[0]
        row_ids = torch.arange(batch, device=embeds.device) if rows is None else rows
        view = CacheView(
            cache,
            rows=slice(batch) if rows is None else rows,
            row_index=row_ids[:, None],
            indices=positions if indices is None else indices,
            start=start if indices is None else None,
            readable=readable,
        )
        rotary = self._rotary(positions, embeds.dtype)
        return self._run(embeds, AttentionInputs(rotary, mask, is_causal, view))

    def forward_uncached(
        self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Run one pass without a cache, e.g. for training.

        mask: bool [batch, 1, t, t]. positions and the result are as in `forward`.
        """
        return self._run(embeds, AttentionInputs(self._rotary(positions, embeds.dtype), mask))

    def _window(
        self, positions: torch.Tensor, length: int, start: int | None
    ) -> tuple[torch.Tensor | None, slice, bool]:
        """Sliding-window attention as (mask or None, readable range, is_causal)."""
        tokens, window = positions.shape[1], self.config.window_keys
        if start is not None and tokens == 1:
            return None, slice(max(0, start + 1 - window), start + 1), False
        if start == 0 and tokens <= window:
            return None, slice(length), True
        return visible_keys(positions, length, window), slice(length), False

    def _rotary(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_angles(positions, self.config.head_dim, self.config.rope_theta, dtype)

    def _run(self, hidden: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        for number, layer in enumerate(self.model.layers):
            hidden = layer(hidden, inputs, number)
        return self.model.norm(hidden)


def visible_keys(positions: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """Sliding-window mask: a token attends to itself and to the `window` - 1 keys before it.

    positions: int64 [batch, t]. Returns bool [batch, 1, t, length]. The window of the released
    models is `DecoderConfig.window_keys`, one more than their `sliding_window`: they were trained
    with 2047 keys before the token itself.
    """
    distance = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    return (distance >= 0) & (distance < window)


def rotary_angles(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, equation 34).

    positions: int64 [batch, t]. Returns cosine and sine, [batch, t, 1, 1, head_dim] each.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (pairs / head_dim)
    angle = (positions[..., None] * frequency).repeat(1, 1, 2)[:, :, None, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of the last axis, as Phi-3 lays them out."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
