"""The decode step of a GPU: compiled kernels, captured as CUDA graphs.

`KernelDecodeStep` is captured once per bucket of batch sizes, on the engine's own batch tensors and
KV cache, and replayed without copies and without waiting for the device. On a CPU `XGenMM.decode`
serves, the reference that the kernels are tested against.
"""

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from xgenmm.config import BLOCK_SIZE, XGenMMConfig
from xgenmm.errors import EngineError
from xgenmm.kernels.self_check import SelfCheck, check_decode_step
from xgenmm.models.attention import Segment
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.quantization import quantize_linear_layers
from xgenmm.models.xgenmm import XGenMM

logger = logging.getLogger(__name__)

DecodeStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens int64 [n], positions int64 [n], block tables int32 [n, max_blocks] -> logits float32
[n, vocab]; position -1 is padding."""

DecodeMode = Literal["auto", "kernels", "plain"]

Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""Returns a function that repeats the given one on the same memory."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_ROWS = BUCKETS[-1]


@dataclass(frozen=True)
class DecodePath:
    """What computes the steps of decoding requests.

    Attributes:
        name: `kernels`, or `plain` for `XGenMM.decode` and the passes that it consists of.
        reason: why, for logs and health reports.
        decode: rows -> logits float32 [rows, vocab] of the first rows of the batch, valid until the
            next call; the rest of the bucket must be padding. None on the plain path.
        segment: positions int64 [rows], block tables int32 [rows, max_blocks] -> the decoding rows
            of a pass with prompts.
        check: what the self check of the kernels has measured.
    """

    name: Literal["kernels", "plain"]
    reason: str
    decode: Callable[[int], torch.Tensor] | None = None
    segment: Callable[[torch.Tensor, torch.Tensor], Segment] | None = None
    check: SelfCheck | None = None


def build_decode_step(
    model: XGenMM,
    cache: KVCache,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    block_tables: torch.Tensor,
    mode: DecodeMode = "auto",
    capture: Capture | None = None,
) -> DecodePath:
    """Compile, capture and check the decode step of a GPU; choose the path that serves.

    Compiled kernels may come from Triton's cache. The cache and the batch must not be in use yet.

    Args:
        tokens, positions, block_tables: of the whole batch, as in `DecodeStep`. The number of rows
            is that of a bucket.
        mode: `auto` falls back to the plain path, with a warning, if anything fails.
        capture: by default CUDA graphs on a GPU, and the plain path elsewhere.

    Raises EngineError if the mode is `kernels` and they cannot serve.
    """
    if mode == "plain":
        return DecodePath("plain", "the plain path is requested")
    if capture is None and model.device.type != "cuda":
        if mode == "kernels":
            raise EngineError(f"kernels need a GPU, but the model is on {model.device}; use auto")
        return DecodePath("plain", f"the model is on {model.device}")
    try:
        from xgenmm.kernels.decode_step import KernelDecodeStep  # needs Triton

        step = KernelDecodeStep(model, cache)
        batch = (tokens, positions, block_tables)
        runner = CudaGraphRunner(step, *batch, capture or cuda_capture())
        sizes = needed_buckets(len(tokens))
        check = check_decode_step(model, cache, batch, runner.decode, sizes)
        check_decode_step(
            model,
            cache,
            batch,
            lambda rows: step.forward(*(tensor[:rows] for tensor in batch)),
            sorted({sizes[0], sizes[-1]}),
        )
    except Exception as error:
        reason = f"the decode kernels failed: {type(error).__name__}: {error}"
        report = (
            f"{reason} ({_versions(model.device)}); please report this message with the output of "
            "`xgenmm doctor`"
        )
        if mode == "kernels":
            raise EngineError(report) from error
        _check_usable(model.device, report)
        logger.warning("%s. The plain path serves, which is slower.", report, exc_info=True)
        return DecodePath("plain", reason)
    logger.info("decode kernels: %s", check)
    return DecodePath("kernels", str(check), runner.decode, step.segment, check)


def _check_usable(device: torch.device, report: str) -> None:
    """Raise EngineError if a failed kernel has left the GPU unusable for this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise EngineError(f"{report}; until then, start with XGENMM_DECODE=plain") from error


def _versions(device: torch.device) -> str:
    """The device and the libraries that generate code for it, for error reports."""
    names = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    for package in ("torch", "triton"):
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            names.append(f"no {package}")
    return ", ".join(names)


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

    buckets = needed_buckets(rows)
    max_blocks = -(-config.decoder.max_positions // BLOCK_SIZE)
    with torch.device("meta"):
        model = XGenMM(config).to(dtype)
        tokens = torch.zeros(buckets[-1], dtype=torch.int64)
        block_tables = torch.zeros(buckets[-1], max_blocks, dtype=torch.int32)
        if quantize is not None:
            quantize_linear_layers(model, quantize)
    step = KernelDecodeStep(model, model.cache(1))
    with ExitStack() as stack:
        # Python before 3.11.8 may fail to parse source code in two threads at once:
        # https://github.com/python/cpython/issues/106905
        if sys.version_info >= (3, 11, 8):
            stack.enter_context(AsyncCompileMode(stack.enter_context(ThreadPoolExecutor())))
        for bucket in buckets:
            step(tokens[:bucket], tokens[:bucket], block_tables[:bucket])
            step.forward(tokens[:bucket], tokens[:bucket], block_tables[:bucket])


def needed_buckets(max_rows: int, buckets: Sequence[int] = BUCKETS) -> Sequence[int]:
    """Return the buckets for batches of 1 to `max_rows` rows.

    Raises ValueError if none is large enough.
    """
    if max_rows > buckets[-1]:
        raise ValueError(f"rows: {max_rows} exceeds the largest bucket, {buckets[-1]}")
    return buckets[: sum(bucket < max_rows for bucket in buckets) + 1]


class CudaGraphRunner:
    """Captures a decode step once per bucket, and replays the smallest bucket that fits a batch.

    The step reads the batch's own tensors, so a replay copies nothing.
    """

    def __init__(
        self,
        step: DecodeStep,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        block_tables: torch.Tensor,
        capture: Capture,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """Capture `step` on the first rows of the batch, for every bucket up to the whole batch.

        tokens, positions, block_tables: as in `DecodeStep`, of the whole batch.

        Raises ValueError if the number of rows is not a bucket.
        """
        rows = len(tokens)
        if rows not in buckets:
            raise ValueError(
                f"rows: {rows} is not one of the buckets {', '.join(map(str, buckets))}"
            )
        self._replay: dict[int, Callable[[], torch.Tensor]] = {}
        batch = (tokens, positions, block_tables)
        with _garbage_collection_paused():
            # Largest first: the smaller ones reuse its memory.
            for bucket in reversed(needed_buckets(rows, buckets)):
                first_rows = (tensor[:bucket] for tensor in batch)
                self._replay[bucket] = capture(partial(step, *first_rows))

    def decode(self, rows: int) -> torch.Tensor:
        """Run the step for the first rows of the batch; the bucket's other rows must be padding.

        Returns logits float32 [rows, vocab], valid until the next call.

        Raises ValueError if `rows` is not between 1 and the whole batch.
        """
        bucket = min((size for size in self._replay if size >= rows), default=0)
        if not 0 < rows <= bucket:
            raise ValueError(f"rows: {rows} is not between 1 and {max(self._replay)}")
        return self._replay[bucket]()[:rows]


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
