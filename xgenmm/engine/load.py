"""Makes an engine from a checkpoint: device, dtype, weights and compiled kernels."""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import torch

from xgenmm.checkpoints.adapter import Adapter, read_adapter
from xgenmm.checkpoints.checks import check_sizes, read_tokenizer
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.config import BLOCK_SIZE, XGenMMConfig
from xgenmm.engine.device import resolve_device, use_device
from xgenmm.engine.engine import GPU_MEMORY_UTILIZATION, MAX_NUM_SEQS, Engine
from xgenmm.engine.scheduler import SchedulerConfig
from xgenmm.errors import InputError
from xgenmm.kernels.cuda_graphs import MAX_ROWS, DecodeMode, compile_kernels
from xgenmm.models.quantization import check_quantization
from xgenmm.models.vision import fuse_attention
from xgenmm.models.xgenmm import XGenMM

if TYPE_CHECKING:
    from xgenmm.engine.json_schema import SchemaLimits

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_folder: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
    cache_bytes: int | None = None,
    quantize: str | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    prefix_caching: bool = True,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    max_num_batched_tokens: int = 512,
    decode: str = "auto",
    schema_limits: "SchemaLimits | None" = None,
) -> Engine:
    """Load an engine from a released name, `demo`, or a checkpoint folder.

    Args:
        name_or_folder: see `xgenmm list`.
        device: `cpu`, `cuda` or `cuda:N`; by default the GPU if there is one.
        dtype: of weights and activations; by default bfloat16 on a GPU and float32 on a CPU.
        max_num_seqs: maximum number of requests (or beams) answered at once; others wait.
        cache_bytes: memory for the KV cache and image features; by default what
            `gpu_memory_utilization` leaves on a GPU, and a quarter of the free memory, at most
            4 GB, on a CPU.
        quantize: `int8` or `fp8` for the decoder's linear layers; by default neither.
        adapter: folder or tar of an adapter that was trained on this checkpoint, by `xgenmm
            finetune` or peft; merged into the weights, before they are quantized.
        prefix_caching: whether images and prompt prefixes of earlier requests are reused.
        gpu_memory_utilization: share of the GPU's memory for weights, workspace and caches.
        max_num_batched_tokens: tokens of a step, while answers are generated. Few keep streams
            even, many raise throughput.
        decode: what computes steps without prompts on a GPU: `plain` PyTorch, the `kernels`, or
            `auto`, the kernels if they pass a check.
        schema_limits: what the JSON schema of a request may take.

    Raises:
        CheckpointError: the checkpoint is missing or broken; the message says how to get it. Or the
            adapter is broken, or of another checkpoint.
        InputError: the device, dtype or quantization is not available, or a number is out of
            range.
        EngineError: the device computes something wrong, or `kernels` are wanted and cannot serve.
    """
    if not 1 <= max_num_seqs <= MAX_ROWS:
        raise InputError("max_num_seqs", f"must be from 1 to {MAX_ROWS}, not {max_num_seqs}")
    if not 0 < gpu_memory_utilization <= 1:
        raise InputError(
            "gpu_memory_utilization", f"must be above 0 and at most 1, not {gpu_memory_utilization}"
        )
    if decode not in get_args(DecodeMode):
        modes = ", ".join(get_args(DecodeMode))
        raise InputError("decode", f"{decode!r} is not one of {modes}")
    folder = resolve(name_or_folder)
    target = resolve_device(device)
    use_device(target)
    weights_dtype = _dtype(dtype, target)
    if quantize is not None:
        check_quantization(quantize, target)
    started = time.monotonic()
    config = read_config(folder)
    if config.demo:
        logger.warning("%s is a demonstration, not a released model", folder.name)
    tokenizer = read_tokenizer(folder, config)
    check_sizes(config, folder)
    trained = None if adapter is None else read_adapter(adapter, folder)
    compiled_rows = 0 if target.type == "cpu" or decode == "plain" else max_num_seqs
    model = _load_model(config, folder, target, weights_dtype, quantize, compiled_rows, trained)
    engine = Engine(
        model,
        tokenizer,
        max_num_seqs,
        cache_bytes,
        prefix_caching=prefix_caching,
        gpu_memory_utilization=gpu_memory_utilization,
        decode=cast(DecodeMode, decode),
        scheduler_config=SchedulerConfig.for_device(target.type, max_num_batched_tokens),
        schema_limits=schema_limits,
    )
    logger.info(
        "%s: ready on %s in %s after %.1f s, with a KV cache of %d positions",
        folder.name, target, quantize or weights_dtype, time.monotonic() - started,
        engine.num_blocks * BLOCK_SIZE,
    )  # fmt: skip
    return engine


def _load_model(
    config: XGenMMConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
    compiled_rows: int,
    adapter: Adapter | None,
) -> XGenMM:
    """Read the weights and compile the decode kernels at the same time.

    compiled_rows: batch size that the kernels are needed for; 0 for none.
    """
    with torch.device("meta"):
        model = XGenMM(config)
    with ThreadPoolExecutor(1, initializer=use_device, initargs=(device,)) as executor:
        if compiled_rows:
            # If it fails, so does the engine's own attempt, which says what that means.
            executor.submit(compile_kernels, config, compiled_rows, dtype, quantize)
        load_parameters(
            model, folder, device=device, dtype=dtype, quantize=quantize, adapter=adapter
        )
        fuse_attention(model.vlm.vision_encoder)
    return model


def _dtype(wanted: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if wanted is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in DTYPES:
        raise InputError("dtype", f"{wanted!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[wanted]
