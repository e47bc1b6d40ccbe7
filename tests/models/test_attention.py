"""Attention over a paged cache equals plain attention over each contiguous sequence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from xgenmm.config import BLOCK_SIZE, DecoderConfig
from xgenmm.models.attention import (
    GrowingCache,
    PagedAttention,
    Segment,
    UncachedAttention,
    continuations_segment,
    decode_segment,
    prompt_segment,
)
from xgenmm.models.kv_cache import NULL_BLOCK, KVCache, slots

HEADS, HEAD_DIM, LAYERS, LAYER = 2, 4, 2, 1
CONFIG = DecoderConfig(hidden_size=HEADS * HEAD_DIM, num_layers=LAYERS, num_heads=HEADS)
MAX_BLOCKS = 5
NUM_BLOCKS = 24
WINDOWS = [40, 1000]


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of tokens, [tokens, heads, head_dim] each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def random(cls, length: int, seed: int = 0) -> "Tokens":
        """`length` tokens."""
        generator = torch.Generator().manual_seed(seed)
        return cls(*torch.randn(3, length, HEADS, HEAD_DIM, generator=generator))

    def __getitem__(self, tokens: slice) -> "Tokens":
        return Tokens(self.query[tokens], self.key[tokens], self.value[tokens])

    def __add__(self, other: "Tokens") -> "Tokens":
        pairs = zip(self.parts, other.parts, strict=True)
        return Tokens(*(torch.cat(pair) for pair in pairs))

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three tensors."""
        return self.query, self.key, self.value

    def attention(self, window: int) -> torch.Tensor:
        """Of one sequence: each token attends to itself and to the `window` - 1 before it."""
        outputs = []
        for token in range(len(self.query)):
            seen = slice(max(0, token + 1 - window), token + 1)
            scores = torch.einsum("hd,khd->hk", self.query[token], self.key[seen])
            weights = (scores.double() / math.sqrt(HEAD_DIM)).softmax(-1)
            outputs.append(torch.einsum("hk,khd->hd", weights, self.value[seen].double()))
        return torch.stack(outputs).float()


@pytest.fixture
def cache() -> KVCache:
    """Full of large numbers, which show in the output of whoever attends to them."""
    allocated = KVCache.allocate(
        CONFIG, NUM_BLOCKS, device=torch.device("cpu"), dtype=torch.float32
    )
    torch.manual_seed(1)
    allocated.keys.normal_(std=100)
    allocated.values.normal_(std=100)
    return allocated


def block_table(*blocks: int) -> torch.Tensor:
    """A block table that ends with padding."""
    padding = [NULL_BLOCK] * (MAX_BLOCKS - len(blocks))
    return torch.tensor([*blocks, *padding], dtype=torch.int32)


def store(cache: KVCache, table: torch.Tensor, tokens: Tokens, start: int = 0) -> None:
    """Write keys and values to the cache one by one."""
    keys, values = cache.layer(LAYER)
    for position, key, value in zip(
        range(start, start + len(tokens.key)), tokens.key, tokens.value, strict=True
    ):
        slot = int(table[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        keys[slot], values[slot] = key, value


def attend(cache: KVCache, *parts: tuple[Segment, Tokens]) -> Sequence[torch.Tensor]:
    """The attention of all segments in one pass, by segment."""
    paged = PagedAttention(cache, [segment for segment, _ in parts])
    _, tokens = parts[0]
    for _, more in parts[1:]:
        tokens += more
    lengths = [len(new.query) for _, new in parts]
    return paged(LAYER, *tokens.parts).split(lengths)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunk", [1, 30, 32, 45, 100])
def test_prompt_in_chunks(cache: KVCache, window: int, chunk: int) -> None:
    tokens, table = Tokens.random(100), block_table(9, 4, 17, 2)
    expected = tokens.attention(window)
    for start in range(0, 100, chunk):
        length = min(chunk, 100 - start)
        segment = prompt_segment(start, length, table, window, torch.float32)
        assert segment.positions.tolist() == list(range(start, start + length))
        assert segment.num_keys < window + length
        (found,) = attend(cache, (segment, tokens[start : start + length]))
        assert_close(found, expected[start : start + length])


@pytest.mark.parametrize("window", WINDOWS)
def test_decoding_rows_of_different_lengths(cache: KVCache, window: int) -> None:
    lengths = (1, 31, 32, 33, 97)
    tables = torch.stack(
        [block_table(*blocks) for blocks in ([3], [1], [8], [20, 5], [7, 2, 19, 11])]
    )
    rows = [Tokens.random(length, seed) for seed, length in enumerate(lengths)]
    for table, row in zip(tables, rows, strict=True):
        store(cache, table, row[:-1])
    positions = torch.tensor(lengths) - 1
    newest = rows[0][-1:]
    for row in rows[1:]:
        newest += row[-1:]
    segment = decode_segment(positions, tables, max(lengths), window, torch.float32)
    (found,) = attend(cache, (segment, newest))
    assert_close(found, torch.stack([row.attention(window)[-1] for row in rows]))


def test_padding_rows_write_to_the_padding_block_only(cache: KVCache) -> None:
    tokens, table = Tokens.random(40), block_table(6, 3)
    store(cache, table, tokens[:-1])
    stale = block_table(6, 3)  # of the request that had the padding row before
    positions, tables = torch.tensor([-1, 39, -1]), torch.stack([stale, table, stale])
    newest = Tokens.random(1, 1) + tokens[-1:] + Tokens.random(1, 2)
    before = KVCache(cache.keys.clone(), cache.values.clone())
    (found,) = attend(cache, (decode_segment(positions, tables, 40, 1000, torch.float32), newest))
    assert_close(found[1], tokens.attention(1000)[-1])
    assert found.isfinite().all()
    written = {NULL_BLOCK * BLOCK_SIZE, 3 * BLOCK_SIZE + 7}
    for after, earlier in zip(cache.layer(LAYER), before.layer(LAYER), strict=True):
        changed = (after != earlier).any(-1).any(-1).nonzero().flatten().tolist()
        assert set(changed) == written
    assert torch.equal(cache.keys[0], before.keys[0])  # the other layer


def test_what_an_earlier_request_left_in_a_block_is_not_attended_to(cache: KVCache) -> None:
    """Not even if it is NaN, which a mask of -inf does not hide."""
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    rows = [Tokens.random(length, seed) for seed, length in enumerate((5, 40))]
    tables = torch.stack([block_table(3), block_table(6, 5)])
    for table, row in zip(tables, rows, strict=True):
        store(cache, table, row[:-1])
    segment = decode_segment(torch.tensor([4, 39]), tables, 40, 1000, torch.float32)
    (found,) = attend(cache, (segment, rows[0][-1:] + rows[1][-1:]))
    assert_close(found, torch.stack([row.attention(1000)[-1] for row in rows]))


def test_rows_share_blocks(cache: KVCache) -> None:
    """Two beams or requests with a common prefix of two blocks."""
    prefix, ends = Tokens.random(64), [Tokens.random(6, seed) for seed in (1, 2)]
    tables = torch.stack([block_table(12, 5, 8), block_table(12, 5, 3)])
    store(cache, tables[0], prefix)
    for table, end in zip(tables, ends, strict=True):
        store(cache, table, end[:-1], start=64)
    segment = decode_segment(torch.tensor([69, 69]), tables, 70, 40, torch.float32)
    (found,) = attend(cache, (segment, ends[0][-1:] + ends[1][-1:]))
    assert_close(found, torch.stack([(prefix + end).attention(40)[-1] for end in ends]))


@pytest.mark.parametrize("window", WINDOWS)
def test_continuations_do_not_see_one_another(cache: KVCache, window: int) -> None:
    lengths = (3, 40, 1, 10)
    prompt, table = Tokens.random(50), block_table(4, 13)
    continuations = [Tokens.random(length, seed) for seed, length in enumerate(lengths, 1)]
    store(cache, table, prompt)
    scratch = slots(torch.tensor([[21, 10]]), torch.arange(sum(lengths))[None])[0]
    segment = continuations_segment(lengths, 50, table, scratch, window, torch.float32)
    assert segment.positions.tolist() == [50 + i for length in lengths for i in range(length)]
    tokens = continuations[0]
    for continuation in continuations[1:]:
        tokens += continuation
    (found,) = attend(cache, (segment, tokens))
    for part, continuation in zip(found.split(lengths), continuations, strict=True):
        assert_close(part, (prompt + continuation).attention(window)[50:])
    # The prompt's last block, which has room, was not written to.
    keys, _ = cache.layer(LAYER)
    assert keys[13 * BLOCK_SIZE + 18 : 14 * BLOCK_SIZE].abs().mean() > 10


@pytest.mark.parametrize("window", WINDOWS)
def test_segments_of_one_pass_do_not_affect_one_another(cache: KVCache, window: int) -> None:
    first, second, third = (Tokens.random(70, seed) for seed in range(3))
    prefix = first[:32]  # of the first and the second
    second = prefix + second[32:]
    tables = [block_table(9, 4, 17), block_table(9, 2, 6), block_table(14, 1, 3)]
    store(cache, tables[0], first[:69])
    store(cache, tables[1], second[:50])
    choice = Tokens.random(5, 4)
    store(cache, tables[2], third)
    scratch = slots(torch.tensor([[22]]), torch.arange(5)[None])[0]
    found = attend(
        cache,
        (
            decode_segment(torch.tensor([69]), tables[0][None], 70, window, torch.float32),
            first[69:],
        ),
        (prompt_segment(50, 20, tables[1], window, torch.float32), second[50:]),
        (prompt_segment(0, 30, block_table(23), window, torch.float32), third[:30]),
        (continuations_segment([5], 70, tables[2], scratch, window, torch.float32), choice),
    )
    expected = [
        first.attention(window)[69:],
        second.attention(window)[50:],
        third.attention(window)[:30],
        (third + choice).attention(window)[70:],
    ]
    for part, whole in zip(found, expected, strict=True):
        assert_close(part, whole)


@pytest.mark.parametrize("window", WINDOWS)
def test_growing_cache(window: int) -> None:
    tokens = Tokens.random(60)
    growing = GrowingCache(window)
    spans = (slice(0, 45), slice(45, 46), slice(46, 60))
    found = [growing(LAYER, *(part[None] for part in tokens[span].parts)) for span in spans]
    assert_close(torch.cat(found, dim=1)[0], tokens.attention(window))


def test_rows_of_a_growing_cache_are_reordered() -> None:
    begun = [Tokens.random(10, seed) for seed in range(2)]
    growing = GrowingCache(1000)
    growing(LAYER, *(torch.stack(pair) for pair in zip(*(row.parts for row in begun), strict=True)))
    growing.reorder(torch.tensor([1, 1, 0]))
    new = [Tokens.random(1, seed) for seed in range(2, 5)]
    found = growing(
        LAYER, *(torch.stack(rows) for rows in zip(*(row.parts for row in new), strict=True))
    )
    for row, parent, token in zip(found, (1, 1, 0), new, strict=True):
        assert_close(row, (begun[parent] + token).attention(1000)[-1:])


def test_uncached_attention_follows_its_mask() -> None:
    tokens = Tokens.random(20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril().triu(-6)
    found = UncachedAttention(mask)(LAYER, *(part[None] for part in tokens.parts))
    assert_close(found[0], tokens.attention(7))
