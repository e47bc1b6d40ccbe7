"""Paged KV cache of the decoder."""

from dataclasses import dataclass

import torch

from xgenmm.config import BLOCK_SIZE, DecoderConfig

NULL_BLOCK = 0
"""Belongs to no sequence: padding writes its keys and values there."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [layers, blocks, BLOCK_SIZE, heads, head_dim] each.

    A sequence has a block table: position p lies in block `table[p // BLOCK_SIZE]` at offset
    `p % BLOCK_SIZE`. The slot of a position is its index when all blocks of a layer lie in a row.
    Sequences may share blocks. What no position of a sequence has been written to is never attended
    to, so blocks are reused without clearing them.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def allocate(
        cls, config: DecoderConfig, num_blocks: int, *, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Allocate `num_blocks` blocks, `NULL_BLOCK` included."""
        shape = (config.num_layers, num_blocks, BLOCK_SIZE, config.num_heads, config.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values)

    @staticmethod
    def block_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Memory of one block with the keys and values of all layers."""
        return 2 * config.num_layers * BLOCK_SIZE * config.hidden_size * dtype.itemsize

    @property
    def num_blocks(self) -> int:
        """Number of blocks, `NULL_BLOCK` included."""
        return self.keys.shape[1]

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values of one layer by slot, [slots, heads, head_dim] each."""
        return self.keys[number].flatten(0, 1), self.values[number].flatten(0, 1)

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy block `sources[i]` to block `targets[i]`, int64 [n] each; no target is a source."""
        for tensor in (self.keys, self.values):
            tensor[:, targets] = tensor[:, sources]


def slots(block_tables: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The cache slots of positions: int [rows, max_blocks], int64 [rows, n] -> int64 [rows, n].

    Negative positions, which are padding, get a slot of `NULL_BLOCK`.
    """
    blocks = block_tables.gather(1, positions.clamp(min=0) // BLOCK_SIZE).long()
    return torch.where(positions < 0, NULL_BLOCK, blocks * BLOCK_SIZE + positions % BLOCK_SIZE)
