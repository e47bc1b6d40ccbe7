"""Each kernel of a decode step against the bandwidth.

Launches go round enough different weights or layers that none is in the device's cache.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from scripts.benchmarks.gpu.context import Context
from scripts.benchmarks.gpu.device import COLD_BYTES
from scripts.benchmarks.gpu.figures import Figure
from xgenmm.config import BLOCK_SIZE, DecoderConfig
from xgenmm.kernels import triton_attention, triton_linear
from xgenmm.models.quantization import QUANTIZATIONS

EPS = 1e-5
MAX_COPIES = 32

Launch = Callable[[], object]


def kernels(context: Context) -> Iterator[Figure]:
    """Measure linear layers for few rows, norm, gating and attention."""
    few = [rows for rows in context.size.batches if rows <= 16]
    for rows in few:
        for kind in (None, *_quantizations(context)):
            yield from _linear_layers(context, rows, kind)
    yield from _elementwise(context, max(context.size.batches))
    for rows in context.size.batches:
        yield _attention(context, rows)


def _linear_layers(context: Context, rows: int, kind: str | None) -> Iterator[Figure]:
    """The decoder's linear layers; without quantization also as PyTorch computes them."""
    decoder = context.size.config.decoder
    width, inner = decoder.hidden_size, decoder.intermediate_size
    layers = {
        "qkv_proj": (3 * width, width),
        "o_proj": (width, width),
        "gate_up_proj": (2 * inner, width),
        "down_proj": (width, inner),
    }
    if kind is None:
        layers["lm_head"] = (decoder.initial_vocab, width)
    for name, (features, layer_width) in layers.items():
        launches, read = _linear(context, rows, features, layer_width, kind, name)
        what = f"{kind or 'plain'} {name}, {_rows(rows)}"
        yield _figure(context, what, launches, read)
        if kind is None:
            launches, read = _torch_linear(context, rows, features, layer_width)
            yield _figure(context, f"PyTorch {name}, {_rows(rows)}", launches, read)


def _linear(
    context: Context, rows: int, features: int, width: int, kind: str | None, name: str
) -> tuple[list[Launch], int]:
    """Launches of one layer with what is fused into it, and the bytes of its weight."""
    x = _random(context, rows, width)
    scale = None if kind is None else _random(context, features).float()
    fused: dict[str, dict[str, Any]] = {
        "qkv_proj": {"norm": _random(context, width), "eps": EPS},
        "o_proj": {"residual": _random(context, rows, features)},
        "gate_up_proj": {"norm": _random(context, width), "eps": EPS, "gated": True},
        "down_proj": {"residual": _random(context, rows, features)},
        "lm_head": {
            "norm": _random(context, width),
            "eps": EPS,
            "bias": _random(context, features),
            "out": _random(context, rows, features).float(),
        },
    }
    weights = _weights(context, features, width, kind)
    launch = partial(triton_linear.linear, x, scale=scale, **fused[name])
    return [partial(launch, weight) for weight in weights], weights[0].nbytes


def _torch_linear(
    context: Context, rows: int, features: int, width: int
) -> tuple[list[Launch], int]:
    x, weights = _random(context, rows, width), _weights(context, features, width, None)
    return [partial(F.linear, x, weight) for weight in weights], weights[0].nbytes


def _attention(context: Context, rows: int) -> Figure:
    """Attention of one token of each row to its whole context, in different layers."""
    # Imported late: it needs einops, and the other kernels nothing but PyTorch and Triton.
    from xgenmm.kernels.decode_step import MAX_SPLITS, PROGRAMS

    config, device = context.size.config.decoder, context.device
    length = context.size.context
    blocks = -(-length // BLOCK_SIZE)
    read = 2 * rows * length * config.hidden_size * device.dtype.itemsize
    layers = _copies(context, read)
    shape = (layers, rows * blocks + 1, BLOCK_SIZE, config.num_heads, config.head_dim)
    keys, values = _random(context, *shape), _random(context, *shape)
    tables = 1 + torch.arange(rows * blocks, device=device.device, dtype=torch.int32)
    positions = torch.full((rows,), length - 1, device=device.device)
    counts = torch.zeros(rows * config.num_heads, dtype=torch.int32, device=device.device)
    qkv = _random(context, rows, 3 * config.hidden_size)
    launches = [
        partial(
            triton_attention.rotate_store_attend,
            qkv,
            _rotary(context, config),
            keys[layer],
            values[layer],
            positions,
            tables.view(rows, blocks),
            config.window_keys,
            max(1, min(MAX_SPLITS, PROGRAMS // (rows * config.num_heads))),
            counts,
        )
        for layer in range(layers)
    ]
    return _figure(context, f"attention, {_rows(rows)}", launches, read)


def _elementwise(context: Context, rows: int) -> Iterator[Figure]:
    """Norm and gating of the batch sizes at which linear layers are PyTorch's."""
    decoder = context.size.config.decoder
    x, norm = _random(context, rows, decoder.hidden_size), _random(context, decoder.hidden_size)
    launch: Launch = partial(triton_linear.rms_norm, x, norm, EPS)
    yield _figure(context, f"rms_norm, {_rows(rows)}", [launch] * 8, 2 * x.nbytes)
    gate_up = _random(context, rows, 2 * decoder.intermediate_size)
    launch = partial(triton_linear.silu_multiply, gate_up)
    yield _figure(context, f"silu_multiply, {_rows(rows)}", [launch] * 8, gate_up.nbytes * 3 // 2)


def _figure(context: Context, name: str, launches: Sequence[Launch], read: int) -> Figure:
    """The share of the copy's bandwidth that a launch uses that moves `read` bytes."""
    with torch.inference_mode():
        seconds = context.device.launch_seconds(launches, context.size.rounds)
    rate = read / seconds
    details = {"µs": 1e6 * seconds, "GB/s": rate / 1e9}
    return Figure(name, 100 * rate / context.bandwidth, "%", details)


def _weights(context: Context, features: int, width: int, kind: str | None) -> list[torch.Tensor]:
    dtype = context.device.dtype if kind is None else QUANTIZATIONS[kind][0]
    count = _copies(context, features * width * dtype.itemsize)
    return [_random(context, features, width).to(dtype) for _ in range(count)]


def _copies(context: Context, size: int) -> int:
    """How many tensors of this size a GPU's cache does not hold."""
    return min(MAX_COPIES, -(-COLD_BYTES // size)) if context.device.cuda else 1


def _random(context: Context, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=context.device.device, dtype=context.device.dtype)


def _rotary(context: Context, config: DecoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of some angles."""
    shape = (config.max_positions, config.head_dim // 2)
    return _random(context, *shape).float(), _random(context, *shape).float()


def _quantizations(context: Context) -> Sequence[str]:
    """The kinds that the device has instructions for."""
    if context.device.cuda and torch.cuda.get_device_capability() < (8, 9):
        return ("int8",)
    return tuple(QUANTIZATIONS)


def _rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"
