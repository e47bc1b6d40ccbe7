"""Scaled dot-product attention over a paged KV cache, over a growing one, or without a cache.

The decoder calls an `Attend` once per layer; what it attends to is the same in every layer. Plain
PyTorch: the reference of the kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from xgenmm.models.kv_cache import KVCache, slots
from xgenmm.models.transfer import to_device


class Attend(Protocol):
    """Attention of one forward pass, with rotary embedding already applied."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend from the queries of new tokens, given the tokens' own keys and values.

        query, key, value: [..., t, heads, head_dim]. Returns the shape of the query.
        """


class UncachedAttention:
    """The tokens of each sequence attend to one another only, e.g. in training.

    mask: bool, broadcastable to [batch, heads, t, t], True where a token attends to a key.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See `Attend`; query, key and value are [batch, t, heads, head_dim]."""
        return _attention(query, key, value, self._mask)


class GrowingCache:
    """Attention of sequences of equal length over a cache that grows with each pass.

    The simplest cache, for one request without the engine.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See `Attend`; query, key and value are [batch, t, heads, head_dim]."""
        if layer in self._layers:
            keys, values = self._layers[layer]
            key, value = torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)
        self._layers[layer] = key, value
        positions = torch.arange(key.shape[1], device=key.device)
        mask = sliding_window_mask(positions[-query.shape[1] :], positions, self._window)
        return _attention(query, key, value, mask)

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i of the batch continue row `rows[i]`: int64 [new batch]."""
        self._layers = {n: (keys[rows], values[rows]) for n, (keys, values) in self._layers.items()}


@dataclass(frozen=True)
class Segment:
    """New tokens of a pass whose attention is computed as one batch.

    Sequences with equally many new tokens each, one sequence after the other.

    Attributes:
        positions: int64 [tokens].
        slots: int64 [tokens], where the tokens' keys and values are stored, before attention.
        key_slots: int64 [sequences, keys], the cache slots that they attend to. None for one
            sequence that attends to these tokens only.
        mask: [sequences or 1, 1, tokens per sequence, keys], added to the scores (`additive_mask`).
            None without `key_slots` is causal attention.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    key_slots: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def num_keys(self) -> int:
        """Keys that are gathered from the cache, of all sequences."""
        return 0 if self.key_slots is None else self.key_slots.numel()

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cached: Sequence[torch.Tensor],
        gathered: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Attend in one layer.

        query, key, value: of these tokens, [tokens, heads, head_dim]. cached: all keys and values
        by slot. gathered: memory for those that the tokens attend to. Returns the shape of the
        query.
        """
        if self.key_slots is None:
            causal = self.mask is None
            return _attention(query[None], key[None], value[None], self.mask, is_causal=causal)[0]
        rows = len(self.key_slots)
        for source, target in zip(cached, gathered, strict=True):
            torch.index_select(source, 0, self.key_slots.flatten(), out=target)
        keys, values = (tensor.unflatten(0, (rows, -1)) for tensor in gathered)
        return _attention(query.unflatten(0, (rows, -1)), keys, values, self.mask).flatten(0, 1)


class PagedAttention:
    """Attention of a flat list of tokens, those of `segments` in order, over a paged cache."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment]) -> None:
        self._cache = cache
        self._segments = segments
        self._lengths = [len(segment.slots) for segment in segments]
        self._slots = torch.cat([segment.slots for segment in segments])
        # The same memory in all layers: on a CPU, new memory costs more than the copy.
        shape = cache.keys.shape[3:]
        self._gathered = [
            [cache.keys.new_empty(segment.num_keys, *shape) for _ in range(2)]
            for segment in segments
        ]

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See `Attend`; query, key and value are [tokens, heads, head_dim]."""
        cached = self._cache.layer(layer)
        cached[0].index_copy_(0, self._slots, key)
        cached[1].index_copy_(0, self._slots, value)
        parts = (tensor.split(self._lengths) for tensor in (query, key, value))
        outputs = [
            segment.attend(*new, cached, gathered)
            for segment, gathered, *new in zip(self._segments, self._gathered, *parts, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def prompt_segment(
    start: int, length: int, block_table: torch.Tensor, window: int, dtype: torch.dtype
) -> Segment:
    """The positions `start` to `start + length` of one sequence.

    block_table: int [max_blocks].
    """
    first = max(0, start - window + 1)
    keys = torch.arange(first, start + length, device=block_table.device)
    key_slots = slots(block_table[None], keys[None])
    positions, new_slots = keys[start - first :], key_slots[0, start - first :]
    if start == 0 and length <= window:
        return Segment(positions, new_slots)
    visible = sliding_window_mask(positions, keys, window)
    return Segment(positions, new_slots, key_slots, additive_mask(visible[None, None], dtype))


def decode_segment(
    positions: torch.Tensor,
    block_tables: torch.Tensor,
    num_keys: int,
    window: int,
    dtype: torch.dtype,
) -> Segment:
    """One token each of several sequences.

    positions: int64 [rows]; negative for padding. block_tables: int [rows, max_blocks]. num_keys:
    above every position.
    """
    count, last = min(num_keys, window), positions[:, None].clamp(min=0)
    keys = (last - count + 1).clamp(min=0) + torch.arange(count, device=positions.device)
    mask = additive_mask(keys <= last, dtype)[:, None, None]
    new_slots = slots(block_tables, positions[:, None])[:, 0]
    # A mask does not hide NaN, which may be left in a block, so masked keys are replaced.
    key_slots = slots(block_tables, keys.minimum(last))
    return Segment(last[:, 0], new_slots, key_slots, mask)


def continuations_segment(
    lengths: Sequence[int],
    start: int,
    block_table: torch.Tensor,
    scratch: torch.Tensor,
    window: int,
    dtype: torch.dtype,
) -> Segment:
    """Several continuations of one sequence side by side; none attends to another.

    Args:
        lengths: tokens of each continuation.
        start: length of the sequence, which is the position of each continuation's first token.
        block_table: int [max_blocks], of the sequence.
        scratch: int64 [tokens], slots for the continuations' keys and values.
    """
    device = block_table.device
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    offsets = torch.cat([torch.arange(length) for length in lengths])
    owner, offsets = to_device(torch.stack([owner, offsets]), device)
    positions = start + offsets
    prefix = torch.arange(max(0, start - window + 1), start, device=device)
    visible = sliding_window_mask(positions, torch.cat([prefix, positions]), window)
    visible[:, len(prefix) :] &= owner[:, None] == owner
    key_slots = torch.cat([slots(block_table[None], prefix[None])[0], scratch])
    mask = additive_mask(visible[None, None], dtype)
    return Segment(positions, scratch, key_slots[None], mask)


def sliding_window_mask(
    positions: torch.Tensor, key_positions: torch.Tensor, window: int
) -> torch.Tensor:
    """Whether a token attends to a key: to itself and to the `window` - 1 positions before it.

    int64 [t], int64 [keys] -> bool [t, keys]. The window of the released models is
    `DecoderConfig.window_keys`, one more than their `sliding_window`: they were trained with 2047
    keys before the token itself.
    """
    distance = positions[:, None] - key_positions
    return (distance >= 0) & (distance < window)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a mask is True and -inf elsewhere; made once, where a bool mask costs every layer."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """All tensors [batch, t or keys, heads, head_dim]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    return out.transpose(1, 2)
