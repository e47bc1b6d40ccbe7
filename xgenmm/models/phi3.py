"""Phi-3 decoder over a static key/value cache, with the additional tokens beside its vocabulary.

Plain PyTorch, the readable truth and the CPU path. Parameter names are those of the released
checkpoints (`vlm.lang_model.*`). Knows nothing of images or text: embeddings in, logits out.
"""

import math
import mmap
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from xgenmm.config import DecoderConfig


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [layers, rows, heads, positions, head_dim], allocated once.

    The index along `positions` is the token's position, so a row needs no bookkeeping but its
    length, and whatever stands behind that length is never seen.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def allocate(
        cls,
        config: DecoderConfig,
        rows: int,
        positions: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "KVCache":
        """A cache for `rows` sequences of at most `positions` tokens.

        On a CPU what was never written to takes no memory yet.
        """
        shape = (config.num_layers, rows, config.num_heads, positions, config.head_dim)
        return cls(*(_zeros(shape, device, dtype) for _ in range(2)))

    @property
    def positions(self) -> int:
        """How many tokens a row can hold."""
        return self.keys.shape[3]

    def reorder(self, rows: torch.Tensor, length: int, into: torch.Tensor | None = None) -> None:
        """Row `into[i]` becomes what row `rows[i]` was, up to `length` positions, as beams need it.

        rows, into: int64 [n]; by default the rows from 0 on are written.
        """
        target = slice(len(rows)) if into is None else into
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :length] = tensor[:, rows, :, :length]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # PyTorch would write the zeros, and NumPy ask for huge pages, of which a short row needs many.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class AdditionalEmbedding(nn.Embedding):
    """The vocabulary's embedding, with rows of its own for ids from `initial_vocab` on."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.initial_vocab = config.initial_vocab
        self.additional_embedding = nn.Embedding(config.additional_tokens, config.hidden_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., hidden_size]."""
        additional = ids >= self.initial_vocab
        known = super().forward(ids.masked_fill(additional, 0))
        beside = self.additional_embedding((ids - self.initial_vocab).clamp(min=0))
        return torch.where(additional[..., None], beside, known)


class AdditionalLinear(nn.Linear):
    """The output layer: logits of the first `initial_vocab` ids, then of the additional tokens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.initial_vocab = config.initial_vocab
        self.additional_fc = nn.Linear(config.hidden_size, config.additional_tokens)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> [..., initial_vocab + additional_tokens]."""
        known = F.linear(hidden, self.weight[: self.initial_vocab], self.bias[: self.initial_vocab])
        return torch.cat([known, self.additional_fc(hidden)], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with rotary positions over the cache."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        step: "Step",
        layer: int,
    ) -> torch.Tensor:
        """[rows, t, hidden_size] -> the same shape; writes to the step's cache, if it has one."""
        qkv = self.qkv_proj(hidden).unflatten(-1, (3, self.heads, -1))
        query, key = _rotate(qkv[:, :, :2], rotary).transpose(1, 3).unbind(2)
        value = qkv[:, :, 2].transpose(1, 2)  # all three [rows, heads, t, head_dim]
        if step.cache is not None:
            keys, values = step.cache.keys[layer], step.cache.values[layer]
            step.write(keys, key)
            step.write(values, value)
            if not step.causal:
                key, value = keys[step.read, :, step.seen], values[step.read, :, step.seen]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=step.mask, is_causal=step.causal
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SiLU-gated feed-forward, gate and up in one matrix."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        step: "Step",
        layer: int,
    ) -> torch.Tensor:
        """[rows, t, hidden_size] -> the same shape."""
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, rotary, step, layer)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Phi3Model(nn.Module):
    """The stack without the output layer; holds the released names `model.*`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = AdditionalEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


@dataclass(frozen=True)
class Step:
    """Where the tokens of one forward pass stand: the same for every layer.

    positions int64 [rows, t] are what the rotary angles say. rows int64 [rows, 1] and indices
    int64 [rows, t] are where keys and values go in the cache, `read` selects the same rows of it
    and `start` is the first index where all rows go to one and the same run of them.

    Of the keys that `seen` selects, mask bool [rows, 1, t, seen] says which ones a token sees; None
    is all of them. `causal` instead: the tokens of the pass see those before them and no other,
    as they do in a first pass, so the cache need not be read. Without a cache the tokens of the
    pass see each other and nothing else.
    """

    positions: torch.Tensor
    mask: torch.Tensor | None
    causal: bool = False
    cache: KVCache | None = None
    rows: torch.Tensor | None = None
    read: torch.Tensor | slice | None = None
    indices: torch.Tensor | None = None
    start: int | None = None
    seen: slice | None = None

    def write(self, cached: torch.Tensor, new: torch.Tensor) -> None:
        """Put [rows, heads, t, head_dim] in its place in one layer's keys or values."""
        if self.start is None:
            cached[self.rows, :, self.indices] = new.transpose(1, 2)
        else:
            cached[self.read, :, self.start : self.start + new.shape[2]] = new


class Phi3Decoder(nn.Module):
    """Embeddings and a cache in, logits out. Prefill and decode are the same call."""

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
        """Final hidden states of `embeds`, whose keys and values are written to the cache.

        Args:
            embeds: [rows, t, hidden_size].
            positions: int64 [rows, t]. Padding behind a row's end takes the positions that
                follow; nothing sees them before a later token overwrites them.
            cache: of as many rows or more.
            length: keys to look at, above every index; an int, so that the host need not
                wait for the device to learn it.
            rows: int64 [rows], the rows of the cache; by default the first ones, which are read
                where they are, others are copied.
            indices: int64 [rows, t], where in the row the keys go; by default at their positions.
            mask: bool [rows, 1, t, length], the keys that a token sees; by default the window
                that ends at its own position.
            start: where the host knows that the positions of every row are `start`, `start` + 1
                and so on: spares the mask of a first pass and of a decode step. The result is the
                same without it.

        Returns:
            [rows, t, hidden_size], normed; `lm_head` makes logits of those one wants.
        """
        count, tokens = embeds.shape[:2]
        window, seen, causal = self.config.window_keys, slice(length), False
        if mask is None:
            if start is not None and tokens == 1:
                seen = slice(max(0, start + 1 - window), start + 1)
            elif start == 0 and tokens <= window:
                causal = True
            else:
                mask = visible_keys(positions, length, window)
        written = torch.arange(count, device=embeds.device) if rows is None else rows
        step = Step(
            positions,
            mask,
            causal,
            cache,
            rows=written[:, None],
            read=slice(count) if rows is None else rows,
            indices=positions if indices is None else indices,
            start=start if indices is None else None,
            seen=seen,
        )
        return self._run(embeds, step)

    def forward_uncached(
        self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """The same in one pass without a cache, as training wants it.

        mask: bool [rows, 1, t, t]; rows, positions and the result are as in `forward`.
        """
        return self._run(embeds, Step(positions, mask))

    def _run(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        config = self.config
        rotary = rotary_angles(step.positions, config.head_dim, config.rope_theta, hidden.dtype)
        for number, layer in enumerate(self.model.layers):
            hidden = layer(hidden, rotary, step, number)
        return self.model.norm(hidden)


def visible_keys(positions: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """bool [rows, 1, t, length]: a token sees itself and the `window` - 1 keys before it."""
    distance = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    return (distance >= 0) & (distance < window)


def rotary_angles(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [rows, t, 1, 1, head_dim] of rotary positions (arXiv 2104.09864, eq. 34)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (pairs / head_dim)
    angle = (positions[..., None] * frequency).repeat(1, 1, 2)[:, :, None, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of the last axis, Phi-3's layout."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
