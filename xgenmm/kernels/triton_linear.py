"""Triton kernels of the decode step: linear layers for few rows, norm and gating.

The kernels read and write memory once and accumulate in float32. RMSNorm is the prologue and the
residual sum the epilogue of a linear layer; `rms_norm` and `silu_multiply` serve the batch sizes at
which cuBLAS is faster.
"""

import torch
import triton
from triton import language as tl

from xgenmm.kernels.triton_launch import launch

MAX_BLOCK_ROWS = 64
"""Rows that one program of `linear` computes at most; more would spill registers."""


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
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
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
    STAGES: tl.constexpr,
):
    """Compute `BLOCK_N` features of one row; products are summed after the loop, not inside it."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
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
    """Compute `BLOCK_N` features of `ROWS` rows on tensor cores, with weights as left operand."""
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
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

    Memory-bound by the weight, `features * width * weight.element_size()` bytes, which is read once
    for every `MAX_BLOCK_ROWS` rows.

    Args:
        x: [rows, width], contiguous along width.
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
    launch(
        _one_row_kernel if rows == 1 else _few_rows_kernel,
        (triton.cdiv(features, blocks["BLOCK_N"]), triton.cdiv(rows, blocks["ROWS"])),
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
    if rows == 1:
        block_k = min(1024, triton.next_power_of_2(width))
        # A short loop is unrolled, with most of its loads in flight at once. A longer one needs
        # asynchronous copies for that; their buffers would cost a short one occupancy.
        stages = 3 if width > 4 * block_k else 1
        return {"ROWS": 1, "BLOCK_N": 4, "BLOCK_K": block_k, "STAGES": stages, "num_warps": 4}
    # Tensor cores need at least 16 rows.
    block_rows = min(MAX_BLOCK_ROWS, max(16, triton.next_power_of_2(rows)))
    largest_block_k = 128 if block_rows == 16 else 64  # more would spill registers
    return {
        "ROWS": block_rows,
        "BLOCK_N": 16 if features <= 4096 else 32,
        "BLOCK_K": min(largest_block_k, max(16, triton.next_power_of_2(width))),
        "num_warps": 4,
        "num_stages": 4,
    }


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
    launch(
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
    launch(
        _silu_multiply_kernel,
        (rows, triton.cdiv(width, block)),
        gate_up,
        out,
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
    )
    return out
