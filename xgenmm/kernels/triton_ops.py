"""Triton kernels of the decode step: linear layers for few rows, rotary embedding, attention.

The reference for each is a few lines of PyTorch in `models/phi3.py`, which the tests compare it
with. The kernels read and write memory once and accumulate in float32. RMSNorm is the prologue and
the residual sum the epilogue of a linear layer; `rms_norm` and `silu_multiply` serve the batch
sizes at which cuBLAS is faster.

A row with a negative position is padding: its cache is neither read nor written, and its attention
output is 0. Nothing synchronizes with the device and shapes depend on argument shapes only, so
everything can be captured in a CUDA graph. On a CPU the kernels run in Triton's interpreter
(TRITON_INTERPRET=1 before the first import), as in the tests; for tensors on the meta device they
are compiled but not run.
"""

from typing import Any

import torch
import triton
from triton import language as tl

LINEAR_ROWS = 64
"""Maximum number of rows for `linear`."""


def _launch(
    kernel: "triton.JITFunction[..., None]",
    grid: tuple[int, ...],
    x: torch.Tensor,
    *others: Any,
    **options: Any,
) -> None:
    """Launch a kernel, or only compile it if `x` is on the meta device."""
    kernel.run(x, *others, grid=grid, warmup=x.is_meta, **options)


@triton.jit
def _finish(
    total,
    total_up,
    squares,
    scale,
    norm,
    bias,
    residual,
    out,
    rows,
    features,
    residual_stride,
    out_stride,
    eps,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Epilogue of `linear`.

    total, total_up: products, [BLOCK_N, ROWS]. squares: sum of squares of each row of x, [ROWS].
    """
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    feature_mask = feature < features
    if scale is not None:
        total *= tl.load(scale + feature, mask=feature_mask, other=0.0)[:, None]
        if GATED:
            total_up *= tl.load(scale + features + feature, mask=feature_mask, other=0.0)[:, None]
    if norm is not None:
        # 1 / rms is the same for all products of a row, so it can be applied to their sum.
        inverse = tl.rsqrt(squares / WIDTH + eps)[None, :]
        total *= inverse
        total_up *= inverse
    if GATED:
        total = total * tl.sigmoid(total) * total_up
    if bias is not None:
        total += tl.load(bias + feature, mask=feature_mask, other=0.0).to(tl.float32)[:, None]
    mask = feature_mask[:, None] & (row < rows)[None, :]
    if residual is not None:
        pointers = residual + row[None, :] * residual_stride + feature[:, None]
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers = out + row[None, :] * out_stride + feature[:, None]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "features"])
def _one_row_kernel(
    x,
    weight,
    scale,
    norm,
    bias,
    residual,
    out,
    rows,
    features,
    x_stride,
    weight_stride,
    residual_stride,
    out_stride,
    eps,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `BLOCK_N` features of one row; products are summed after the loop, not inside it."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        pointers = weight + feature[:, None] * weight_stride + k[None, :]
        mask = (feature < features)[:, None] & (k < WIDTH)[None, :]
        w = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            pointers += features * weight_stride
            up = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
        values = tl.load(x + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        if norm is not None:
            squares += values * values
            values *= tl.load(norm + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * values[None, :]
        if GATED:
            total_up += up.to(tl.float32) * values[None, :]
    _finish(
        tl.sum(total, axis=1)[:, None],
        tl.sum(total_up, axis=1)[:, None],
        tl.sum(squares, axis=0),
        scale,
        norm,
        bias,
        residual,
        out,
        rows,
        features,
        residual_stride,
        out_stride,
        eps,
        WIDTH,
        GATED,
        ROWS,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=["rows", "features"])
def _few_rows_kernel(
    x,
    weight,
    scale,
    norm,
    bias,
    residual,
    out,
    rows,
    features,
    x_stride,
    weight_stride,
    residual_stride,
    out_stride,
    eps,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `BLOCK_N` features of `ROWS` rows with tensor cores, weights as the left operand."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    total_up = tl.zeros((BLOCK_N, ROWS), tl.float32)
    squares = tl.zeros((BLOCK_K, ROWS), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        pointers = weight + feature[:, None] * weight_stride + k[None, :]
        mask = (feature < features)[:, None] & (k < WIDTH)[None, :]
        w = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
        x_mask = (k < WIDTH)[:, None] & (row < rows)[None, :]
        values = tl.load(x + k[:, None] + row[None, :] * x_stride, mask=x_mask, other=0.0)
        if norm is not None:
            wide = values.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm + k, mask=k < WIDTH, other=0.0).to(tl.float32)
            values = (wide * gain[:, None]).to(values.dtype)
        total = tl.dot(w.to(values.dtype), values, total, input_precision="ieee")
        if GATED:
            pointers += features * weight_stride
            up = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
            total_up = tl.dot(up.to(values.dtype), values, total_up, input_precision="ieee")
    _finish(
        total,
        total_up,
        tl.sum(squares, axis=0),
        scale,
        norm,
        bias,
        residual,
        out,
        rows,
        features,
        residual_stride,
        out_stride,
        eps,
        WIDTH,
        GATED,
        ROWS,
        BLOCK_N,
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Optional RMSNorm, linear layer, optional SiLU gating, bias, residual sum, for a few rows.

    Memory-bound by the weight, which is read once: `features * width * weight.element_size()`
    bytes.

    Args:
        x: [rows, width], at most `LINEAR_ROWS` rows, contiguous along width.
        weight: [features, width], contiguous along width; a float type, int8 or float8_e4m3fn
            (compute capability 8.9 or higher).
        scale: float32 [features], factor of each feature's quantized weights.
        norm: [width], weight of an RMSNorm of x with `eps`.
        bias: [features].
        residual: [rows, features], added to the result.
        gated: the weight holds the rows of `gate` and then of `up`; the result is silu(gate) * up,
            of half as many features. Excludes a bias.
        out: [rows, features], contiguous along features; by default a new tensor of x's dtype.

    Returns `out`.
    """
    rows, width = x.shape
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = x.new_empty(rows, features)
    residual_stride = 0 if residual is None else residual.stride(0)
    tensors = (weight, scale, norm, bias, residual, out)
    strides = (x.stride(0), weight.stride(0), residual_stride, out.stride(0))
    blocks = _linear_blocks(rows, width, features)
    _launch(
        _one_row_kernel if rows == 1 else _few_rows_kernel,
        (triton.cdiv(features, blocks["BLOCK_N"]),),
        x,
        *tensors,
        rows,
        features,
        *strides,
        eps,
        WIDTH=width,
        GATED=gated,
        **blocks,
    )
    return out


def _linear_blocks(rows: int, width: int, features: int) -> dict[str, int]:
    """Choose block sizes and launch options for `linear`.

    Memory bandwidth needs many bytes in flight: many programs per multiprocessor, each with several
    16-byte loads per thread. Not yet tuned on a device.
    """
    width = triton.next_power_of_2(width)
    if rows == 1:
        return {
            "ROWS": 1,
            "BLOCK_N": 4,
            "BLOCK_K": min(1024, width),
            "num_warps": 4,
            "num_stages": 2,
        }
    padded_rows = max(16, triton.next_power_of_2(rows))  # tensor cores need at least 16
    largest_block_k = 128 if padded_rows == 16 else 64  # more would spill registers
    return {
        "ROWS": padded_rows,
        "BLOCK_N": 16 if features <= 4096 else 32,
        "BLOCK_K": min(largest_block_k, max(16, width)),
        "num_warps": 4,
        "num_stages": 4,
    }


@triton.jit
def _rotate_store_kernel(
    qkv,
    positions,
    cosine,
    sine,
    query,
    keys,
    values,
    qkv_stride,
    cache_row_stride,
    cache_head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """Process one head of one row."""
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, HALF_BLOCK)
    lane_mask = lane < half
    position = tl.load(positions + row)
    is_token = position >= 0
    table_offset = tl.maximum(position, 0) * half + lane
    cos = tl.load(cosine + table_offset, mask=lane_mask, other=0.0)
    sin = tl.load(sine + table_offset, mask=lane_mask, other=0.0)
    source = qkv + row * qkv_stride + head * HEAD_DIM + lane
    target = query + (row * HEADS + head) * HEAD_DIM + lane
    first = tl.load(source, mask=lane_mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=lane_mask, other=0.0).to(tl.float32)
    dtype = keys.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=lane_mask)
    tl.store(target + half, (second * cos + first * sin).to(dtype), mask=lane_mask)

    # A cache may have more than 2**31 elements, so its offsets need 64 bits.
    offset = row.to(tl.int64) * cache_row_stride + head * cache_head_stride + position * HEAD_DIM
    store_mask = lane_mask & is_token
    source += HEADS * HEAD_DIM
    first = tl.load(source, mask=lane_mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=lane_mask, other=0.0).to(tl.float32)
    tl.store(keys + offset + lane, (first * cos - second * sin).to(dtype), mask=store_mask)
    tl.store(keys + offset + lane + half, (second * cos + first * sin).to(dtype), mask=store_mask)
    source += HEADS * HEAD_DIM
    tl.store(values + offset + lane, tl.load(source, mask=lane_mask), mask=store_mask)
    tl.store(values + offset + lane + half, tl.load(source + half, mask=lane_mask), mask=store_mask)


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Apply the rotary embedding to queries and keys; write keys and values to one layer's cache.

    Reads and writes qkv once, `2 * qkv.numel()` elements, and reads the rows' table entries.

    Args:
        qkv: [rows, 3 * heads * head_dim].
        positions: int64 [rows]; negative for padding.
        rotary: cosine and sine, float32 [positions, head_dim / 2], contiguous (`rotary_tables`).
        keys, values: [at least rows, heads, positions, head_dim], contiguous in the last two
            dimensions.

    Returns the queries, [rows, heads, head_dim].
    """
    rows, (heads, head_dim) = qkv.shape[0], (keys.shape[1], keys.shape[3])
    query = qkv.new_empty(rows, heads, head_dim)
    cosine, sine = rotary
    _launch(
        _rotate_store_kernel,
        (rows, heads),
        qkv,
        positions,
        cosine,
        sine,
        query,
        keys,
        values,
        qkv.stride(0),
        keys.stride(0),
        keys.stride(1),
        HEADS=heads,
        HEAD_DIM=head_dim,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return query


@triton.jit
def _attend_kernel(
    query,
    keys,
    values,
    positions,
    out,
    partial,
    arrival_counts,
    cache_row_stride,
    cache_head_stride,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend to one split of one head's keys; the last program of a head combines its splits.

    Each program keeps the running maximum, the sum of exponentials and the weighted sum of values
    of an online softmax (arXiv 1805.02867). The split of the keys is Flash-Decoding's.
    """
    head, split = tl.program_id(0), tl.program_id(1)  # head counts across all rows
    row = head // HEADS
    lane = tl.arange(0, DIM)
    lane_mask = lane < HEAD_DIM
    end = tl.load(positions + row).to(tl.int32) + 1
    begin = tl.maximum(end - WINDOW, 0)
    split_length = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BLOCK) * BLOCK
    begin = begin + split * split_length
    end = tl.minimum(begin + split_length, end)

    q = tl.load(query + head * HEAD_DIM + lane, mask=lane_mask, other=0.0).to(tl.float32) * scale
    base = row.to(tl.int64) * cache_row_stride + (head % HEADS) * cache_head_stride
    # Finite, so that a split without keys gets the factor exp(-1e30) = 0 rather than inf - inf.
    maximum = -1e30
    denominator = 0.0
    accumulator = tl.zeros((DIM,), tl.float32)
    while begin < end:  # the interpreter does not support range over device values
        index = begin + tl.arange(0, BLOCK)
        key_mask = index < end
        offset = base + index[:, None] * HEAD_DIM + lane[None, :]
        mask = key_mask[:, None] & lane_mask[None, :]
        k = tl.load(keys + offset, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + offset, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(key_mask, tl.sum(k * q[None, :], axis=1), -1e30)
        new_maximum = tl.maximum(maximum, tl.max(score, axis=0))
        rescale = tl.exp(maximum - new_maximum)
        p = tl.where(key_mask, tl.exp(score - new_maximum), 0.0)
        accumulator = accumulator * rescale + tl.sum(p[:, None] * v, axis=0)
        denominator = denominator * rescale + tl.sum(p, axis=0)
        maximum = new_maximum
        begin += BLOCK

    target = out + head * HEAD_DIM + lane
    if SPLITS == 1:
        result = accumulator / tl.where(denominator > 0, denominator, 1.0)
        tl.store(target, result.to(out.dtype.element_ty), mask=lane_mask)
    else:
        # Layout of a split's result: DIM weighted sums, the maximum, the denominator.
        result_base = partial + (head * SPLITS + split) * (DIM + 2)
        tl.store(result_base + lane, accumulator)
        tl.store(result_base + DIM, maximum)
        tl.store(result_base + DIM + 1, denominator)
        tl.debug_barrier()  # all threads must have stored before this program counts as arrived
        if tl.atomic_add(arrival_counts + head, 1) == SPLITS - 1:
            splits = tl.arange(0, SPLIT_LANES)
            split_mask = splits < SPLITS
            # .cg bypasses the L1 cache, which is not coherent with other programs' stores.
            split_base = partial + (head * SPLITS + splits) * (DIM + 2)
            maxima = tl.load(split_base + DIM, mask=split_mask, other=-1e30, cache_modifier=".cg")
            denominators = tl.load(
                split_base + DIM + 1, mask=split_mask, other=0.0, cache_modifier=".cg"
            )
            partial_sums = tl.load(
                split_base[:, None] + lane[None, :],
                mask=split_mask[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            rescales = tl.exp(maxima - tl.max(maxima, axis=0))
            denominator_sum = tl.sum(denominators * rescales, axis=0)
            weighted_sum = tl.sum(partial_sums * rescales[:, None], axis=0)
            result = weighted_sum / tl.where(denominator_sum > 0, denominator_sum, 1.0)
            tl.store(target, result.to(out.dtype.element_ty), mask=lane_mask)
            tl.store(arrival_counts + head, 0)  # reset for the next layer


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    window: int,
    splits: int,
    arrival_counts: torch.Tensor,
) -> torch.Tensor:
    """Attend from one token per row to the last `window` keys of its row, itself included.

    Reads the visible keys and values once,
    `2 * rows * heads * min(position + 1, window) * head_dim` elements. Each head's keys are split
    among several programs (Flash-Decoding), so that even a small batch fills the device.

    Args:
        query: [rows, heads, head_dim], contiguous.
        keys, values: [at least rows, heads, positions, head_dim], contiguous in the last two
            dimensions.
        positions: int64 [rows], positions of the tokens; negative for padding.
        splits: programs per head.
        arrival_counts: int32 [at least rows * heads], zero before and after the call.

    Returns [rows, heads * head_dim].
    """
    rows, heads, head_dim = query.shape
    dim = triton.next_power_of_2(head_dim)
    out = query.new_empty(rows, heads * head_dim)
    partial_shape = (rows * heads, splits, dim + 2) if splits > 1 else (0,)
    partial = query.new_empty(partial_shape, dtype=torch.float32)
    tensors = (keys, values, positions, out, partial, arrival_counts)
    _launch(
        _attend_kernel,
        (rows * heads, splits),
        query,
        *tensors,
        keys.stride(0),
        keys.stride(1),
        head_dim**-0.5,
        HEADS=heads,
        HEAD_DIM=head_dim,
        DIM=dim,
        WINDOW=window,
        SPLITS=splits,
        SPLIT_LANES=triton.next_power_of_2(splits),
        BLOCK=32,
        num_warps=4,
    )
    return out


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Normalize one row."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    mask = k < WIDTH
    values = tl.load(x + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    gain = tl.load(weight + k, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + k, (values * inverse * gain).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x [rows, width], contiguous along width; each element is read and written once."""
    rows, width = x.shape
    out = x.new_empty(rows, width)
    block = triton.next_power_of_2(width)
    _launch(
        _rms_norm_kernel,
        (rows,),
        x,
        weight,
        out,
        x.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        num_warps=8,
    )
    return out


@triton.jit
def _silu_multiply_kernel(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Process one block of one row."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < WIDTH
    source = gate_up + row * 2 * WIDTH + k
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * WIDTH + k, result.to(out.dtype.element_ty), mask=mask)


def silu_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """Multiply SiLU of the first half of each row by the second half.

    gate_up: [rows, 2 * width], contiguous. Returns [rows, width].
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    _launch(
        _silu_multiply_kernel,
        (rows, triton.cdiv(width, block)),
        gate_up,
        out,
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
    )
    return out
