"""The fastest decode step for a device, chosen by `build_decode_step`.

On a GPU: `KernelDecodeStep`, captured as one CUDA graph per bucket of batch sizes, with a static
cache and static inputs, and replayed without waiting for the device. On a CPU: `XGenMM.decode`, the
reference that the kernels are tested against.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from xgenmm.config import XGenMMConfig
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.quantization import quantize_linear_layers
from xgenmm.models.xgenmm import XGenMM

Decode = Callable[[torch.Tensor, torch.Tensor, KVCache, int], torch.Tensor]
"""Tokens int64 [n], positions int64 [n], cache, length -> logits float32 [n, vocab].

As `XGenMM.decode`, for the first n rows of the cache."""

DecodeStep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens int64 [n], positions int64 [n] -> logits float32 [n, vocab]; position -1 is padding."""

Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""Returns a function that repeats the given one on the same memory."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
MAX_ROWS = BUCKETS[-1]


def build_decode_step(model: XGenMM, cache: KVCache) -> Decode:
    """Build the fastest decode step for the model's device and for this cache only.

    On a GPU this compiles the kernels, or finds them in Triton's cache, and captures the graphs.
    The next call overwrites the returned logits.
    """
    if model.device.type != "cuda":
        return lambda *inputs: model.decode(*inputs)  # looked up on each call, so it can be patched
    from xgenmm.kernels.decode_step import KernelDecodeStep  # needs Triton, absent on a CPU

    step = KernelDecodeStep(model, cache)
    graphs = CudaGraphRunner(step, cache.keys.shape[1], model.device, cuda_capture())

    def decode(
        tokens: torch.Tensor, positions: torch.Tensor, used_cache: KVCache, length: int
    ) -> torch.Tensor:
        if used_cache is not cache:
            raise ValueError("cache: the decode step was built for another cache; pass that one")
        return graphs.decode(tokens, positions)

    return decode


def compile_kernels(
    config: XGenMMConfig, rows: int, dtype: torch.dtype, quantize: str | None = None
) -> None:
    """Compile the kernels that `build_decode_step` needs on a GPU, or load them from the cache.

    This needs only sizes, so it can run while the weights are read. Later launches on the
    current device find the kernels in memory.

    Args:
        rows: maximum batch size of a step.
        dtype: of the weights and the cache.
        quantize: one of `quantization.QUANTIZATIONS`.
    """
    from triton import AsyncCompileMode

    from xgenmm.kernels.decode_step import KernelDecodeStep

    with torch.device("meta"):
        model = XGenMM(config).to(dtype)
        tokens = torch.zeros(MAX_ROWS, dtype=torch.int64)
        if quantize is not None:
            quantize_linear_layers(model, quantize)
    step = KernelDecodeStep(model, model.cache(rows, config.decoder.max_positions + 1))
    with ExitStack() as stack:
        # Python before 3.11.8 may fail to parse source code in two threads at once:
        # https://github.com/python/cpython/issues/106905
        if sys.version_info >= (3, 11, 8):
            stack.enter_context(AsyncCompileMode(stack.enter_context(ThreadPoolExecutor())))
        for bucket in needed_buckets(rows):
            step(tokens[:bucket], tokens[:bucket])


def needed_buckets(max_rows: int, buckets: Sequence[int] = BUCKETS) -> Sequence[int]:
    """Return the buckets for batches of 1 to `max_rows` rows.

    Raises ValueError if none is large enough.
    """
    if max_rows > buckets[-1]:
        raise ValueError(f"rows: {max_rows} exceeds the largest bucket, {buckets[-1]}")
    return buckets[: sum(bucket < max_rows for bucket in buckets) + 1]


class CudaGraphRunner:
    """Captures a decode step once per bucket, and replays the smallest bucket that fits a batch.

    Inputs are copied to static memory, padded to the bucket with position -1.
    """

    def __init__(
        self,
        step: DecodeStep,
        max_rows: int,
        device: torch.device,
        capture: Capture,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Capture `step` for every bucket that batches of up to `max_rows` rows need."""
        needed = needed_buckets(max_rows, buckets)
        self._tokens = torch.zeros(needed[-1], dtype=torch.int64, device=device)
        self._positions = torch.full_like(self._tokens, -1)
        self._replay: dict[int, Callable[[], torch.Tensor]] = {}
        with _garbage_collection_paused():
            for bucket in reversed(needed):  # largest first: the smaller ones reuse its memory
                tokens, positions = self._tokens[:bucket], self._positions[:bucket]
                self._replay[bucket] = capture(partial(step, tokens, positions))

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens and positions int64 [n] -> logits float32 [n, vocab], valid until the next call.

        Raises ValueError if n is 0 or exceeds the largest captured bucket.
        """
        count = tokens.shape[0]
        bucket = min((size for size in self._replay if size >= count), default=0)
        if not 0 < count <= bucket:
            raise ValueError(f"rows: {count} is not between 1 and {max(self._replay)}")
        self._tokens[:count].copy_(tokens)
        self._positions[:count].copy_(positions)
        self._positions[count:bucket].fill_(-1)
        return self._replay[bucket]()[:count]


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Collect garbage before this block, not in it: freeing a dead graph invalidates a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def cuda_capture() -> Capture:
    """Return a `Capture` that records CUDA graphs.

    All graphs share one memory pool, since they never run at the same time.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # warm-up: compile and allocate now, not during capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture
