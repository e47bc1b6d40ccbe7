"""The decode step as fast as the device's memory, chosen in one place: `build_decode_step`.

On a GPU: the kernels of `kernel_step.py`, one CUDA graph for each bucket of batch sizes, over one
static cache and static inputs, replayed without the host waiting for anything. On a CPU: the plain
path of `decoder.py`, which is also what the other is tested against. Knows nothing of requests.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from xgenmm.config import XGenMMConfig
from xgenmm.garbage import uncollected
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.quantization import quantize_linear_layers
from xgenmm.models.xgenmm import XGenMM

Decode = Callable[[torch.Tensor, torch.Tensor, KVCache, int], torch.Tensor]
"""Tokens int64 [n], positions int64 [n], cache, length -> logits float32 [n, vocab].

As `XGenMM.decode`; the rows are the cache's first n."""

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens int64 [n], positions int64 [n] -> logits float32 [n, vocab]; a position -1 is no row."""

Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""Makes a function that repeats what the given one does to the same memory."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
MAX_ROWS = BUCKETS[-1]


def build_decode_step(model: XGenMM, cache: KVCache) -> Decode:
    """The fastest decode step that this device has, for this cache alone.

    On a GPU this compiles the kernels (or finds them in Triton's cache) and captures the graphs.
    The logits that it returns are overwritten by its next call.
    """
    if model.device.type != "cuda":
        return lambda *step: model.decode(*step)  # whatever `decode` is by then
    from xgenmm.kernels.decode_step import KernelDecodeStep  # Triton, which a CPU's PyTorch lacks

    step = KernelDecodeStep(model, cache)
    graphs = CudaGraphRunner(step, cache.keys.shape[1], model.device, cuda_capture())

    def decode(
        tokens: torch.Tensor, positions: torch.Tensor, given: KVCache, length: int
    ) -> torch.Tensor:
        if given is not cache:
            raise ValueError("cache: not the one whose decode step was captured")
        return graphs.decode(tokens, positions)

    return decode


def compile_kernels(
    config: XGenMMConfig, rows: int, dtype: torch.dtype, quantize: str | None = None
) -> None:
    """Compile the kernels of a GPU's `build_decode_step` in threads, or find them in the cache.

    Needs nothing but the sizes, so it can be done while the weights are read. Later launches on the
    current device find the kernels in memory.

    rows: most rows of a step. dtype: of weights and cache. quantize: of
        `quantization.QUANTIZATIONS`.
    """
    from triton.runtime._async_compile import AsyncCompileMode

    from xgenmm.kernels.decode_step import KernelDecodeStep

    with torch.device("meta"):
        model = XGenMM(config).to(dtype)
        tokens = torch.zeros(BUCKETS[-1], dtype=torch.int64)
        if quantize is not None:
            quantize_linear_layers(model, quantize)
    step = KernelDecodeStep(model, model.cache(rows, config.decoder.max_positions + 1))
    # Python before 3.11.8 cannot parse in two threads if a collection lets them take turns
    # (python/cpython#106905).
    with uncollected(), ThreadPoolExecutor() as pool, AsyncCompileMode(pool):
        for bucket in needed_buckets(rows):
            step(tokens[:bucket], tokens[:bucket])


def needed_buckets(most_rows: int, buckets: Sequence[int] = BUCKETS) -> Sequence[int]:
    """The buckets that batches of 1 to `most_rows` rows need.

    Raises ValueError if none is large enough.
    """
    if most_rows > buckets[-1]:
        raise ValueError(f"rows: {most_rows} are more than the largest bucket, {buckets[-1]}")
    return buckets[: sum(bucket < most_rows for bucket in buckets) + 1]


class CudaGraphRunner:
    """A step captured once for each bucket of batch sizes, and replayed for the smallest that fits.

    Inputs are copied to static memory; the bucket's further rows get the position -1.
    """

    def __init__(
        self,
        step: Step,
        most_rows: int,
        device: torch.device,
        capture: Capture,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Capture `step` for all buckets that up to `most_rows` rows need."""
        needed = needed_buckets(most_rows, buckets)
        self._tokens = torch.zeros(needed[-1], dtype=torch.int64, device=device)
        self._positions = torch.full_like(self._tokens, -1)
        self._replay: dict[int, Callable[[], torch.Tensor]] = {}
        for bucket in reversed(needed):  # the largest first: smaller ones fit its memory
            tokens, positions = self._tokens[:bucket], self._positions[:bucket]
            self._replay[bucket] = capture(partial(step, tokens, positions))

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens and positions int64 [n] -> logits float32 [n, vocab], good until the next call."""
        count = tokens.shape[0]
        bucket = min((size for size in self._replay if size >= count), default=0)
        if not 0 < count <= bucket:
            raise ValueError(f"rows: {count} asked for, 1 to {max(self._replay)} were captured")
        self._tokens[:count].copy_(tokens)
        self._positions[:count].copy_(positions)
        self._positions[count:bucket].fill_(-1)
        return self._replay[bucket]()[:count]


def cuda_capture() -> Capture:
    """A `Capture` that makes CUDA graphs, all of one memory pool as they never run side by side."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function()  # compiles and allocates whatever a capture may not
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    return capture
