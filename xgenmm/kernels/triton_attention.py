"""Triton kernels of the decode step: attention over the paged KV cache.

A row with a negative position is padding: its cache is neither read nor written, and its attention
output is 0.
"""

import torch
import triton
from triton import language as tl

from xgenmm.kernels.triton_launch import launch


@triton.jit
def _load_rotated(vector, cosine, sine, position, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Load a vector of one head and rotate its pairs (i, i + HEAD_DIM / 2): float32 [DIM]."""
    half: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, DIM)
    mask = lane < HEAD_DIM
    angle = position * half + lane % half
    cos = tl.load(cosine + angle, mask=mask, other=0.0)
    sin = tl.load(sine + angle, mask=mask, other=0.0)
    x = tl.load(vector + lane, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(vector + (lane + half) % HEAD_DIM, mask=mask, other=0.0).to(tl.float32)
    return x * cos + tl.where(lane < half, -partner, partner) * sin


@triton.jit
def _attend_kernel(
    source,
    cosine,
    sine,
    keys,
    values,
    positions,
    block_tables,
    out,
    partial,
    arrival_counts,
    source_stride,
    block_table_stride,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_LANES: tl.constexpr,
):
    """Attend to one split of one head's keys; the last program of a head combines its splits.

    Each program does an online softmax (arXiv 1805.02867) for each offset within a block, with its
    own maximum, sum of exponentials and weighted sum of values, so that warps exchange data only
    after the loop. The split of the keys is Flash-Decoding's.

    source: with rotary tables, queries, keys and values of the newest tokens before rotation, whose
    keys and values are not yet in the cache; otherwise queries.
    """
    row_head, split = tl.program_id(0), tl.program_id(1)
    row, head = row_head // HEADS, row_head % HEADS
    lane = tl.arange(0, DIM)
    lane_mask = lane < HEAD_DIM
    position = tl.load(positions + row).to(tl.int32)
    begin = tl.maximum(position + 1 - WINDOW, 0)
    end = position + 1
    first_block = begin // BLOCK
    num_blocks = tl.cdiv(end, BLOCK) - first_block  # 0 for padding
    split_blocks = tl.cdiv(num_blocks, SPLITS)
    begoffset = first_block + split * split_blocks
    end_block = tl.minimum(begoffset + split_blocks, first_block + num_blocks)
    block_table = block_tables + row * block_table_stride
    offset = tl.arange(0, BLOCK)
    elements = (offset[:, None] * HEADS + head) * HEAD_DIM + lane[None, :]  # within a block
    block_elements: tl.constexpr = BLOCK * HEADS * HEAD_DIM
    pointer = source + row * source_stride + head * HEAD_DIM

    # Finite, so that an offset without keys gets the factor exp(-1e30) = 0 rather than inf - inf.
    maximum = tl.full((BLOCK,), -1e30, tl.float32)
    denominator = tl.zeros((BLOCK,), tl.float32)
    accumulator = tl.zeros((BLOCK, DIM), tl.float32)
    if cosine is None:
        q = tl.load(pointer + lane, mask=lane_mask, other=0.0).to(tl.float32) * scale
    else:
        angle = tl.maximum(position, 0)
        q = _load_rotated(pointer, cosine, sine, angle, HEAD_DIM, DIM) * scale
        pointer += HEADS * HEAD_DIM
        new_key = _load_rotated(pointer, cosine, sine, angle, HEAD_DIM, DIM)
        new_value = tl.load(pointer + HEADS * HEAD_DIM + lane, mask=lane_mask, other=0.0)
        # The split that ends with the newest token stores it, and starts with it.
        end -= 1
        new_block = end // BLOCK
        is_last = (begoffset <= new_block) & (new_block < end_block)
        is_new = is_last & (offset == end % BLOCK)
        base = tl.load(block_table + new_block, mask=is_last, other=0).to(tl.int64) * block_elements
        target = base + (end % BLOCK * HEADS + head) * HEAD_DIM + lane
        tl.store(keys + target, new_key.to(keys.dtype.element_ty), mask=lane_mask & is_last)
        tl.store(values + target, new_value, mask=lane_mask & is_last)
        maximum = tl.where(is_new, tl.sum(new_key * q, axis=0), maximum)
        denominator = tl.where(is_new, 1.0, denominator)
        accumulator = tl.where(is_new[:, None], new_value.to(tl.float32)[None, :], accumulator)

    block = begoffset
    while block < end_block:  # the interpreter does not support range over device values
        # A cache may have more than 2**31 elements, so its offsets need 64 bits.
        base = tl.load(block_table + block).to(tl.int64) * block_elements
        index = block * BLOCK + offset
        visible = (index >= begin) & (index < end)
        mask = visible[:, None] & lane_mask[None, :]
        k = tl.load(keys + base + elements, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + base + elements, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(visible, tl.sum(k * q[None, :], axis=1), float("-inf"))
        new_maximum = tl.maximum(maximum, score)
        rescale = tl.exp(maximum - new_maximum)
        p = tl.exp(score - new_maximum)
        accumulator = accumulator * rescale[:, None] + p[:, None] * v
        denominator = denominator * rescale + p
        maximum = new_maximum
        block += 1

    split_maximum = tl.max(maximum, axis=0)
    factor = tl.exp(maximum - split_maximum)
    total = tl.sum(accumulator * factor[:, None], axis=0)
    normalizer = tl.sum(denominator * factor, axis=0)
    target = out + row_head * HEAD_DIM + lane
    if SPLITS == 1:
        result = total / tl.where(normalizer > 0, normalizer, 1.0)
        tl.store(target, result.to(out.dtype.element_ty), mask=lane_mask)
    else:
        # Layout of a split's result: DIM weighted sums, the maximum, the denominator.
        result_base = partial + (row_head * SPLITS + split) * (DIM + 2)
        tl.store(result_base + lane, total)
        tl.store(result_base + DIM, split_maximum)
        tl.store(result_base + DIM + 1, normalizer)
        tl.debug_barrier()  # all threads must have stored before this program counts as arrived
        if tl.atomic_add(arrival_counts + row_head, 1) == SPLITS - 1:
            splits = tl.arange(0, SPLIT_LANES)
            split_mask = splits < SPLITS
            # .cg bypasses the L1 cache, which is not coherent with other programs' stores.
            split_base = partial + (row_head * SPLITS + splits) * (DIM + 2)
            maxima = tl.load(split_base + DIM, mask=split_mask, other=-1e30, cache_modifier=".cg")
            normalizers = tl.load(
                split_base + DIM + 1, mask=split_mask, other=0.0, cache_modifier=".cg"
            )
            totals = tl.load(
                split_base[:, None] + lane[None, :],
                mask=split_mask[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            factors = tl.exp(maxima - tl.max(maxima, axis=0))
            normalizer = tl.sum(normalizers * factors, axis=0)
            total = tl.sum(totals * factors[:, None], axis=0)
            result = total / tl.where(normalizer > 0, normalizer, 1.0)
            tl.store(target, result.to(out.dtype.element_ty), mask=lane_mask)
            tl.store(arrival_counts + row_head, 0)  # reset for the next layer


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    block_tables: torch.Tensor,
    window: int,
    splits: int,
    arrival_counts: torch.Tensor,
) -> torch.Tensor:
    """Attend from one token per row to the last `window` keys of its sequence, itself included.

    Reads the visible keys and values once,
    `2 * rows * heads * min(position + 1, window) * head_dim` elements. Each head's keys are split
    among several programs (Flash-Decoding), so that even a small batch fills the device.

    Args:
        query: [rows, heads, head_dim], contiguous.
        keys, values: a layer of a `KVCache`, [blocks, BLOCK_SIZE, heads, head_dim], contiguous.
        positions: int64 [rows], positions of the tokens; negative for padding.
        block_tables: int32 [rows, max_blocks], contiguous along blocks.
        splits: programs per head.
        arrival_counts: int32 [at least rows * heads], zero before and after the call.

    Returns [rows, heads * head_dim].
    """
    cache = (keys, values, positions, block_tables)
    return _attend(query.flatten(1), None, cache, window, splits, arrival_counts)


def rotate_store_attend(
    qkv: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    block_tables: torch.Tensor,
    window: int,
    splits: int,
    arrival_counts: torch.Tensor,
) -> torch.Tensor:
    """Apply the rotary embedding to queries and keys, store keys and values, then `attend`.

    Args:
        qkv: [rows, 3 * heads * head_dim], contiguous along the last dimension.
        rotary: cosine and sine, float32 [positions, head_dim / 2], contiguous (`rotary_tables`).
        others: as in `attend`. The block of each token's position belongs to its sequence alone.

    Returns [rows, heads * head_dim].
    """
    cache = (keys, values, positions, block_tables)
    return _attend(qkv, rotary, cache, window, splits, arrival_counts)


def _attend(
    source: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    window: int,
    splits: int,
    arrival_counts: torch.Tensor,
) -> torch.Tensor:
    keys, _, _, block_tables = cache
    rows, (block_size, heads, head_dim) = source.shape[0], keys.shape[1:]
    dim = triton.next_power_of_2(head_dim)
    out = source.new_empty(rows, heads * head_dim)
    partial_shape = (rows * heads, splits, dim + 2) if splits > 1 else (0,)
    partial = source.new_empty(partial_shape, dtype=torch.float32)
    cosine, sine = rotary or (None, None)
    launch(
        _attend_kernel,
        (rows * heads, splits),
        source,
        cosine,
        sine,
        *cache,
        out,
        partial,
        arrival_counts,
        source.stride(0),
        block_tables.stride(0),
        head_dim**-0.5,
        HEADS=heads,
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK=block_size,
        WINDOW=window,
        SPLITS=splits,
        SPLIT_LANES=triton.next_power_of_2(splits),
        num_warps=8,  # fewer would leave a thread too few registers to keep its loads in flight
    )
    return out
