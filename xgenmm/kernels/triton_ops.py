"""Triton kernels of the decode step: skinny linear layers, rotary with cache write, attention.

Each kernel equals a few lines of `decoder.py`, which stay the reference; here they move no byte
twice. All arithmetic is float32, results are rounded once. A row with a position below 0 is no
row: nothing of the cache is read or written for it and its attention is 0. No function waits for
the device, and shapes depend on the arguments' shapes only, so all of it can be captured in a CUDA
graph. On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1 before the first import), which
is how the tests prove them; on the meta device they are only compiled. Knows nothing of modules,
models or graphs.

RMSNorm is the prologue and the residual sum the epilogue of a linear layer, so the hidden state
travels once; `rms_norm` and `silu_multiply` are for the batches that a vendor's matrix product
serves better.
"""

from typing import Any

import torch
import triton
from triton import language as tl

LINEAR_ROWS = 64
"""The most rows that `linear` takes."""


def _launch(
    kernel: "triton.JITFunction[..., None]",
    grid: tuple[int, ...],
    x: torch.Tensor,
    *others: Any,
    **options: Any,
) -> None:
    """Run the programs of `grid`. With an `x` on the meta device the kernel is only compiled."""
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
    """What follows the products of `linear`: sums [BLOCK_N, ROWS], squares [ROWS] -> `out`."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    known = feature < features
    if scale is not None:
        total *= tl.load(scale + feature, mask=known, other=0.0)[:, None]
        if GATED:
            total_up *= tl.load(scale + features + feature, mask=known, other=0.0)[:, None]
    if norm is not None:
        # The 1 / rms of a row is the same for all its products, so it can come last.
        inverse = tl.rsqrt(squares / WIDTH + eps)[None, :]
        total *= inverse
        total_up *= inverse
    if GATED:
        total = total * tl.sigmoid(total) * total_up
    if bias is not None:
        total += tl.load(bias + feature, mask=known, other=0.0).to(tl.float32)[:, None]
    inside = known[:, None] & (row < rows)[None, :]
    if residual is not None:
        place = residual + row[None, :] * residual_stride + feature[:, None]
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = out + row[None, :] * out_stride + feature[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


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
    """`BLOCK_N` features of one row. Products are summed at the end, not inside the loop."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        place = weight + feature[:, None] * weight_stride + k[None, :]
        inside = (feature < features)[:, None] & (k < WIDTH)[None, :]
        w = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
        if GATED:
            place += features * weight_stride
            up = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
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
    """`BLOCK_N` features of `ROWS` rows on the matrix units, the weights their left side."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    total_up = tl.zeros((BLOCK_N, ROWS), tl.float32)
    squares = tl.zeros((BLOCK_K, ROWS), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        place = weight + feature[:, None] * weight_stride + k[None, :]
        inside = (feature < features)[:, None] & (k < WIDTH)[None, :]
        w = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
        x_inside = (k < WIDTH)[:, None] & (row < rows)[None, :]
        values = tl.load(x + k[:, None] + row[None, :] * x_stride, mask=x_inside, other=0.0)
        if norm is not None:
            wide = values.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm + k, mask=k < WIDTH, other=0.0).to(tl.float32)
            values = (wide * gain[:, None]).to(values.dtype)
        total = tl.dot(w.to(values.dtype), values, total, input_precision="ieee")
        if GATED:
            place += features * weight_stride
            up = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
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
    """RMSNorm -> weight (-> SiLU and multiply) -> bias -> residual sum, for a few rows.

    Must move the weight once, `features * width * weight.element_size()` bytes, beside which rows
    and results are nothing.

    Args:
        x: [rows, width], at most `LINEAR_ROWS` rows, contiguous along width.
        weight: [features, width], contiguous along width; a float type, int8 or float8_e4m3fn
            (which needs a device of compute capability 8.9).
        scale: float32 [features]: what the stored weights of a feature are multiplied by.
        norm: [width], weight of an RMSNorm of x with `eps`; by default there is none.
        bias: [features].
        residual: [rows, features], added to the result.
        gated: the first half of the weight's rows is `gate`, the second `up`, and the result is
            silu(gate) * up, of half as many features; excludes a bias.
        out: [rows, features], contiguous along features; by default a new tensor like x.

    Returns `out`.
    """
    rows, width = x.shape
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = x.new_empty(rows, features)
    padded, block_n, block_k, stages = _linear_blocks(rows, width, features)
    kernel = _one_row_kernel if rows == 1 else _few_rows_kernel
    _launch(
        kernel,
        (triton.cdiv(features, block_n),),
        x,
        weight,
        scale,
        norm,
        bias,
        residual,
        out,
        rows,
        features,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        WIDTH=width,
        GATED=gated,
        ROWS=padded,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=stages,
    )
    return out


def _linear_blocks(rows: int, width: int, features: int) -> tuple[int, int, int, int]:
    """(padded rows, features and width of a block, pipeline stages) for a program of `linear`.

    Chosen for many programs a multiprocessor, each with several 16-byte loads a thread in flight:
    bandwidth is a matter of bytes under way. Not tuned on a device yet.
    """
    width = triton.next_power_of_2(width)
    if rows == 1:
        return 1, 4, min(1024, width), 2
    # The matrix units take 16 rows at least.
    padded = max(16, triton.next_power_of_2(rows))
    block_k = 128 if padded == 16 else 64  # more would not fit into the registers
    return padded, 16 if features <= 4096 else 32, min(block_k, max(16, width)), 4


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
    """One head of one row."""
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, HALF_BLOCK)
    inside = lane < half
    position = tl.load(positions + row)
    present = position >= 0
    table = tl.maximum(position, 0) * half + lane
    cos = tl.load(cosine + table, mask=inside, other=0.0)
    sin = tl.load(sine + table, mask=inside, other=0.0)
    source = qkv + row * qkv_stride + head * HEAD_DIM + lane
    target = query + (row * HEADS + head) * HEAD_DIM + lane
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    kind = keys.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(target + half, (second * cos + first * sin).to(kind), mask=inside)

    # A cache passes 2**31 elements: its offsets are 64 bits wide.
    place = row.to(tl.int64) * cache_row_stride + head * cache_head_stride + position * HEAD_DIM
    stored = inside & present
    source += HEADS * HEAD_DIM
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(keys + place + lane, (first * cos - second * sin).to(kind), mask=stored)
    tl.store(keys + place + lane + half, (second * cos + first * sin).to(kind), mask=stored)
    source += HEADS * HEAD_DIM
    tl.store(values + place + lane, tl.load(source, mask=inside), mask=stored)
    tl.store(values + place + lane + half, tl.load(source + half, mask=inside), mask=stored)


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to one layer's cache; return the queries.

    Must move the qkv row twice, read and written: `2 * qkv.numel()` elements, and the tables' rows.

    Args:
        qkv: [rows, 3 * heads * head_dim].
        positions: int64 [rows]; below 0 is no row.
        rotary: cosine and sine, float32 [positions, head_dim / 2], contiguous (`rotary_tables`).
        keys, values: [rows or more, heads, positions, head_dim], the last two contiguous.

    Returns [rows, heads, head_dim].
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
    arrivals,
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
    """One share of one head's keys; the program that comes last for a head adds the shares up."""
    head, split = tl.program_id(0), tl.program_id(1)  # head: of all rows
    row = head // HEADS
    lane = tl.arange(0, DIM)
    inside = lane < HEAD_DIM
    end = tl.load(positions + row).to(tl.int32) + 1
    begin = tl.maximum(end - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BLOCK) * BLOCK
    begin = begin + split * share
    end = tl.minimum(begin + share, end)

    q = tl.load(query + head * HEAD_DIM + lane, mask=inside, other=0.0).to(tl.float32) * scale
    base = row.to(tl.int64) * cache_row_stride + (head % HEADS) * cache_head_stride
    # Finite, so that a share without keys weighs exp(-huge) = 0 and never makes inf - inf.
    top = -1e30
    weight = 0.0
    total = tl.zeros((DIM,), tl.float32)
    while begin < end:  # the interpreter takes no range over numbers of the device
        index = begin + tl.arange(0, BLOCK)
        seen = index < end
        place = base + index[:, None] * HEAD_DIM + lane[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(keys + place, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * q[None, :], axis=1), -1e30)
        new_top = tl.maximum(top, tl.max(score, axis=0))
        kept = tl.exp(top - new_top)
        p = tl.where(seen, tl.exp(score - new_top), 0.0)
        total = total * kept + tl.sum(p[:, None] * v, axis=0)
        weight = weight * kept + tl.sum(p, axis=0)
        top = new_top
        begin += BLOCK

    target = out + head * HEAD_DIM + lane
    if SPLITS == 1:
        result = total / tl.where(weight > 0, weight, 1.0)
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    else:
        # A share is DIM sums, then the largest score and the weight.
        own = partial + (head * SPLITS + split) * (DIM + 2)
        tl.store(own + lane, total)
        tl.store(own + DIM, top)
        tl.store(own + DIM + 1, weight)
        tl.debug_barrier()  # all threads have stored before the arrival is told
        if tl.atomic_add(arrivals + head, 1) == SPLITS - 1:
            shares = tl.arange(0, SPLIT_LANES)
            there = shares < SPLITS
            # Past the first-level cache, which may not know what other programs stored.
            base_share = partial + (head * SPLITS + shares) * (DIM + 2)
            tops = tl.load(base_share + DIM, mask=there, other=-1e30, cache_modifier=".cg")
            weights = tl.load(base_share + DIM + 1, mask=there, other=0.0, cache_modifier=".cg")
            totals = tl.load(
                base_share[:, None] + lane[None, :],
                mask=there[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            kept_shares = tl.exp(tops - tl.max(tops, axis=0))
            whole = tl.sum(weights * kept_shares, axis=0)
            summed = tl.sum(totals * kept_shares[:, None], axis=0)
            result = summed / tl.where(whole > 0, whole, 1.0)
            tl.store(target, result.to(out.dtype.element_ty), mask=inside)
            tl.store(arrivals + head, 0)  # ready for the next layer


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    window: int,
    splits: int,
    arrivals: torch.Tensor,
) -> torch.Tensor:
    """Attention of one token a row over the last `window` keys of its row, itself among them.

    Must move the keys and values that are seen once:
    `2 * rows * heads * min(position + 1, window) * head_dim` elements. The keys of a head are
    shared among `splits` programs (flash-decoding), so that few rows still fill the device.

    Args:
        query: [rows, heads, head_dim], contiguous.
        keys, values: [rows or more, heads, positions, head_dim], the last two contiguous.
        positions: int64 [rows], of the tokens; below 0 is no row.
        splits: programs a head.
        arrivals: int32 [rows * heads or more], zeros, and zeros again afterwards.

    Returns [rows, heads * head_dim].
    """
    rows, heads, head_dim = query.shape
    dim = triton.next_power_of_2(head_dim)
    out = query.new_empty(rows, heads * head_dim)
    shares = (rows * heads, splits, dim + 2) if splits > 1 else (0,)
    partial = query.new_empty(shares, dtype=torch.float32)
    _launch(
        _attend_kernel,
        (rows * heads, splits),
        query,
        keys,
        values,
        positions,
        out,
        partial,
        arrivals,
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
    """One row."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    values = tl.load(x + row * x_stride + k, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    gain = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + k, (values * inverse * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of [rows, width], contiguous along width; moves each element in and out once."""
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
    """One block of one row."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < WIDTH
    source = gate_up + row * 2 * WIDTH + k
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * WIDTH + k, result.to(out.dtype.element_ty), mask=inside)


def silu_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """[rows, 2 * width], contiguous -> silu(first half) * second half, [rows, width].

    Must move three elements for each of the result.
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
