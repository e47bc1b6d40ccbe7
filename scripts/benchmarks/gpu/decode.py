"""The decoder: a GPU's decode step against plain PyTorch and the bandwidth, and prefill."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from scripts.benchmarks.gpu.context import Context
from scripts.benchmarks.gpu.figures import Figure
from xgenmm.config import BLOCK_SIZE
from xgenmm.kernels.cuda_graphs import CudaGraphRunner, cuda_capture, needed_buckets
from xgenmm.kernels.decode_step import KernelDecodeStep
from xgenmm.kernels.self_check import check_decode_step
from xgenmm.models.attention import prompt_segment
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.phi3 import Phi3Decoder

CHECKED_BLOCKS = 300  # of the KV cache of a self check, which wants a few for each row


@torch.inference_mode()
def self_check(context: Context) -> Iterator[Figure]:
    """Run the check that an engine makes before it serves."""
    rows = max(context.size.batches)
    cache = context.model.cache(CHECKED_BLOCKS)
    max_blocks = -(-context.size.config.decoder.max_positions // BLOCK_SIZE)
    started = time.perf_counter()
    batch, step = _decode_step(context, cache, rows, max_blocks)
    yield Figure("kernels and graphs", time.perf_counter() - started, "s")
    result = check_decode_step(context.model, cache, batch, step, needed_buckets(rows))
    yield Figure("duration", result.seconds, "s")
    for check in result.batches:
        details = {"% for keys and values": 100 * check.cache}
        yield Figure(f"batch {check.rows}: drift of the logits", 100 * check.logits, "%", details)


@torch.inference_mode()
def decode(context: Context) -> Iterator[Figure]:
    """Measure greedy decode steps of each batch size, whose tokens stay on the device."""
    size, decoder = context.size, context.size.config.decoder
    start, most = size.context - size.tokens // 2, max(size.batches)
    blocks = -(-(start + size.tokens) // BLOCK_SIZE)
    cache = context.model.cache(1 + most * blocks)
    batch, step = _decode_step(context, cache, most, blocks)
    tokens, positions, block_tables = batch
    block_tables.copy_(torch.arange(1, cache.num_blocks).view(most, blocks))

    def run(rows: int) -> None:
        positions[:rows] = start
        for _ in range(size.tokens):
            tokens[:rows] = step(rows).argmax(-1)
            positions[:rows] += 1
        positions.fill_(-1)

    for rows in size.batches:
        seconds = context.device.seconds(partial(run, rows), size.rounds) / size.tokens
        cached = 2 * rows * size.context * decoder.hidden_size * decoder.num_layers
        read = _weight_bytes(context.model.decoder) + cached * context.device.dtype.itemsize
        share = 100 * read / seconds / context.bandwidth
        details = {"ms": 1e3 * seconds, "tokens/s": rows / seconds, "GB/s": read / seconds / 1e9}
        yield Figure(f"batch {rows}: of the copy bandwidth", share, "%", details)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, positions and block tables."""


def _decode_step(
    context: Context, cache: KVCache, rows: int, max_blocks: int
) -> tuple[Batch, Callable[[int], torch.Tensor]]:
    """An idle batch and its decode step: by kernels or, on a CPU, the plain one."""
    tokens = torch.zeros(rows, dtype=torch.int64, device=context.device.device)
    block_tables = tokens.new_zeros(rows, max_blocks, dtype=torch.int32)
    positions, model = torch.full_like(tokens, -1), context.model
    batch = (tokens, positions, block_tables)
    if context.device.cuda:
        return batch, CudaGraphRunner(KernelDecodeStep(model, cache), *batch, cuda_capture()).decode
    return batch, lambda rows: model.decode(
        tokens[:rows], positions[:rows], block_tables[:rows], cache
    )


def _weight_bytes(decoder: Phi3Decoder) -> int:
    """Bytes of weights that a decode step must read: all but the embeddings."""
    state = decoder.state_dict()
    return sum(tensor.nbytes for name, tensor in state.items() if "embed" not in name)


@torch.inference_mode()
def prefill(context: Context) -> Iterator[Figure]:
    """Measure the prefill of one prompt in one pass, logits of the next token included."""
    size, decoder = context.size, context.size.config.decoder
    layers = context.model.decoder.model.layers
    weights = sum(parameter.numel() for parameter in layers.parameters())
    for length in size.prompts:
        seconds = context.device.seconds(_prefill(context, length), size.rounds)
        # Products with the weights, and half of the products of all queries with all keys.
        flops = 2 * length * weights + 2 * length**2 * decoder.hidden_size * decoder.num_layers
        share = 100 * flops / seconds / context.matmul_rate
        details = {"% of a matrix product": share, "tokens/s": length / seconds}
        yield Figure(f"{length} tokens", 1e3 * seconds, "ms", details)


def _prefill(context: Context, length: int) -> Callable[[], torch.Tensor]:
    """A function that prefills a prompt of this length and returns the next token."""
    device, model, decoder = context.device, context.model, context.size.config.decoder
    cache = model.cache(1 + -(-length // BLOCK_SIZE))
    table = torch.arange(1, cache.num_blocks, device=device.device)
    embeds = torch.randn(length, decoder.hidden_size, device=device.device).to(device.dtype)

    def run() -> torch.Tensor:
        segment = prompt_segment(0, length, table, decoder.window_keys, model.dtype)
        return model.logits(model.forward(embeds, [segment], cache)[-1:]).argmax(-1)

    return run
