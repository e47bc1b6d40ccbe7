"""Static KV cache of the decoder, and the part of it that one forward pass uses."""

from dataclasses import dataclass

import torch

from xgenmm.config import DecoderConfig


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [layers, rows, heads, max_length, head_dim] each.

    A token is stored at the index of its position. The caller tracks the length of each row;
    whatever lies beyond it is never attended to, so rows are reused without clearing them.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def allocate(
        cls,
        config: DecoderConfig,
        rows: int,
        max_length: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "KVCache":
        """Allocate a cache for `rows` sequences of at most `max_length` tokens."""
        shape = (config.num_layers, rows, config.num_heads, max_length, config.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values)

    @property
    def max_length(self) -> int:
        """Number of tokens that a row can hold."""
        return self.keys.shape[3]

    def reorder(self, rows: torch.Tensor, length: int, into: torch.Tensor | None = None) -> None:
        """Copy the first `length` tokens of row `rows[i]` to row `into[i]`, as beam search needs.

        All rows are read before any is written. rows, into: int64 [n]; by default the first n
        rows are written.
        """
        target = slice(len(rows)) if into is None else into
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :length] = tensor[:, rows, :, :length]


@dataclass(frozen=True)
class CacheView:
    """Where one forward pass writes its keys and values and which ones it reads, in every layer.

    Attributes:
        rows: the cache rows of the batch: a slice, which is read in place, or int64 [batch], which
            is read as a copy.
        row_index: the same rows, int64 [batch, 1].
        indices: int64 [batch, t], the index within its row of each new token.
        start: the first index if every row writes to start, start + 1, ...; a slice is then
            copied instead of scattering. None otherwise.
        readable: the range of indices that attention reads.
    """

    cache: KVCache
    rows: slice | torch.Tensor
    row_index: torch.Tensor
    indices: torch.Tensor
    start: int | None
    readable: slice

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the keys and values of the new tokens, [batch, heads, t, head_dim] each."""
        for cached, new in ((self.cache.keys, keys), (self.cache.values, values)):
            if self.start is None:
                cached[layer][self.row_index, :, self.indices] = new.transpose(1, 2)
            else:
                cached[layer][self.rows, :, self.start : self.start + new.shape[2]] = new

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the readable keys and values, [batch, heads, n, head_dim] each."""
        return (
            self.cache.keys[layer][self.rows, :, self.readable],
            self.cache.values[layer][self.rows, :, self.readable],
        )
