"""Compares the fast decode step with the plain one, `XGenMM.decode`, before the engine serves.

Both run on the same noise in the KV cache. Positions include the first and the last of the context,
of a block and of the attention window. What the plain step has written is overwritten with NaN
before the fast step runs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xgenmm.config import BLOCK_SIZE
from xgenmm.models.kv_cache import KVCache, slots
from xgenmm.models.transfer import to_device
from xgenmm.models.xgenmm import XGenMM

LIMITS = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.2}
"""The largest relative difference that rounding may cause, by dtype of the model.

About twice what two ways of rounding make: with random weights in 32 layers the plain step differs
from float32 by up to 0.07 in bfloat16 and 0.008 in float16, with those of the demo by up to 0.06
and 0.006. Faults make more than half of the norm.
"""

_EDGE_CASES = 8
_SHARED_BLOCKS = 32
_CHUNK = 16  # sequences of a plain step, which copies all keys and values that they attend to


class SelfCheckError(RuntimeError):
    """The fast decode step computes something else than the plain one."""


@dataclass(frozen=True)
class BatchCheck:
    """The largest relative differences in batches of `rows` rows.

    logits: of the logits of a row. cache: of the keys or values that a row adds to a layer.
    """

    rows: int
    logits: float
    cache: float


@dataclass(frozen=True)
class SelfCheck:
    """The result of a check that found no fault, and its duration in seconds."""

    batches: Sequence[BatchCheck]
    seconds: float

    def __str__(self) -> str:
        logits = max(batch.logits for batch in self.batches)
        cache = max(batch.cache for batch in self.batches)
        sizes = ", ".join(str(batch.rows) for batch in self.batches)
        return (
            f"batches of {sizes} differ from the plain step by at most {logits:.1e} in logits and "
            f"{cache:.1e} in keys and values, checked in {self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class _Sequences:
    """Sequences of which each decodes one token.

    tokens, positions: int64 [n]. block_tables: int32 [n, max_blocks]. new_slots: int64 [n], where
    the new keys and values go; no other sequence reads them. used_blocks: blocks below this number
    belong to the sequences, but for the one for padding.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    block_tables: torch.Tensor
    new_slots: torch.Tensor
    used_blocks: int


@torch.inference_mode()
def check_decode_step(
    model: XGenMM,
    cache: KVCache,
    batch: Sequence[torch.Tensor],
    decode: Callable[[int], torch.Tensor],
    batch_sizes: Sequence[int],
) -> SelfCheck:
    """Check `decode` for each batch size, with a cache and a batch that are not in use yet.

    Leaves the batch idle, and zeros in the blocks of the cache that it has used.

    Args:
        batch: the tokens, positions and block tables that `decode` reads; see `DecodeStep`.
        decode: rows -> logits float32 [rows, vocab].

    Raises SelfCheckError, which says for which batch size what differs, and by how much.
    """
    started = time.monotonic()
    sequences = _make_sequences(model, cache, max(_EDGE_CASES, *batch_sizes), batch[2].shape[1])
    checks = []
    try:
        _fill_with_noise(cache, sequences, model.config.decoder.window_keys)
        logits = _plain_logits(model, cache, sequences)
        written = _read(cache, sequences.new_slots)
        for rows in batch_sizes:
            check = _check_batch(cache, batch, decode, rows, sequences, logits, written)
            _raise_if_different(check, LIMITS[model.dtype])
            checks.append(check)
    finally:
        _make_idle(batch)
        for blocks in (cache.keys, cache.values):
            blocks[:, : sequences.used_blocks] = 0
    return SelfCheck(checks, time.monotonic() - started)


def _make_sequences(model: XGenMM, cache: KVCache, count: int, max_blocks: int) -> _Sequences:
    """Up to `count` sequences, as many as fit the cache; the first ones are the edge cases.

    Sequences consist of shared blocks, but for the block that the new token goes to and, in edge
    cases, the blocks at the beginning of the window.
    """
    config = model.config.decoder
    last, window = config.max_positions - 1, config.window_keys
    edges = (last, 0, 1, window, BLOCK_SIZE - 1, BLOCK_SIZE, window - 1, last // 2)
    positions = [min(position, last) for position in edges]
    positions += [last * i // count for i in range(_EDGE_CASES, count)]
    generator = torch.Generator().manual_seed(0)
    shared = min(_SHARED_BLOCKS, cache.num_blocks // 4)
    block_tables = torch.randint(1, 1 + shared, (count, max_blocks), generator=generator)
    used_blocks = 1 + shared
    for row, position in enumerate(positions):
        owned = {position // BLOCK_SIZE}
        if row < _EDGE_CASES and position >= window:
            owned |= {(position - window) // BLOCK_SIZE, (position - window + 1) // BLOCK_SIZE}
        if used_blocks + len(owned) > cache.num_blocks:
            positions = positions[:row]
            break
        for index in owned:
            block_tables[row, index] = used_blocks
            used_blocks += 1
    vocab = config.initial_vocab + config.additional_tokens
    tokens = torch.randint(vocab, (len(positions),), generator=generator)
    block_tables = to_device(block_tables[: len(positions)].int(), model.device)
    tokens, where = to_device(torch.stack([tokens, torch.tensor(positions)]), model.device)
    new_slots = slots(block_tables, where[:, None])[:, 0]
    return _Sequences(tokens, where, block_tables, new_slots, used_blocks)


def _fill_with_noise(cache: KVCache, sequences: _Sequences, window: int) -> None:
    """Fill the sequences' blocks.

    One of a whole window of keys hardly changes the result. So that a window which begins too early
    or too late is seen, the values at both sides of its beginning are that much larger.
    """
    generator = torch.Generator(cache.keys.device).manual_seed(0)
    for blocks in (cache.keys, cache.values):
        for layer in blocks:
            layer[1 : sequences.used_blocks].normal_(generator=generator)
    edges = slice(_EDGE_CASES)
    begin = sequences.positions[edges, None] - window
    around = slots(sequences.block_tables[edges], torch.cat([begin, begin + 1], dim=1))
    cache.values.flatten(1, 2)[:, around[begin[:, 0] >= 0].flatten()] *= window


def _plain_logits(model: XGenMM, cache: KVCache, sequences: _Sequences) -> torch.Tensor:
    """The logits of the plain step, float32 [n, vocab]; writes the new keys and values."""
    logits = []
    for start in range(0, len(sequences.tokens), _CHUNK):
        part = slice(start, start + _CHUNK)
        inputs = sequences.tokens[part], sequences.positions[part], sequences.block_tables[part]
        logits.append(model.decode(*inputs, cache))
    return torch.cat(logits)


def _check_batch(
    cache: KVCache,
    batch: Sequence[torch.Tensor],
    decode: Callable[[int], torch.Tensor],
    rows: int,
    sequences: _Sequences,
    logits: torch.Tensor,
    written: torch.Tensor,
) -> BatchCheck:
    """Run one batch of `rows` rows, or as many as cover all edge cases.

    logits, written: what the plain step has computed and stored for all sequences.
    """
    differences = []
    for start in range(0, min(max(rows, _EDGE_CASES), len(logits)), rows):
        part = slice(start, start + rows)
        new_slots = sequences.new_slots[part]
        _make_idle(batch)
        inputs = (sequences.tokens, sequences.positions, sequences.block_tables)
        for tensor, values in zip(batch, inputs, strict=True):
            tensor[: len(new_slots)] = values[part]
        for blocks in (cache.keys, cache.values):
            blocks.flatten(1, 2)[:, new_slots] = torch.nan
        found = decode(rows)[: len(new_slots)]
        expected = logits[part]
        # A constant added to all logits of a row changes no probability.
        in_logits = _largest_difference(
            found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
        )
        in_cache = _largest_difference(_read(cache, new_slots), written[:, :, part])
        differences.append(torch.stack([in_logits, in_cache]))
    in_logits, in_cache = torch.stack(differences).amax(0).tolist()
    return BatchCheck(rows, in_logits, in_cache)


def _raise_if_different(check: BatchCheck, limit: float) -> None:
    for name, difference in (("logits", check.logits), ("keys and values", check.cache)):
        if not difference <= limit:  # also if it is NaN
            raise SelfCheckError(
                f"in batches of {check.rows}, {name} differ from those of the plain step by "
                f"{difference:.2g} of their norm; rounding explains {limit:g}"
            )


def _make_idle(batch: Sequence[torch.Tensor]) -> None:
    tokens, positions, block_tables = batch
    tokens.zero_()
    positions.fill_(-1)
    block_tables.zero_()


def _read(cache: KVCache, new_slots: torch.Tensor) -> torch.Tensor:
    """Keys and values at slots, float32 [2, layers, slots, heads * head_dim]."""
    both = [tensor.flatten(1, 2)[:, new_slots] for tensor in (cache.keys, cache.values)]
    return torch.stack(both).flatten(3).float()


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Norm of the difference over the norm of `expected`, along the last dimension: the largest."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
