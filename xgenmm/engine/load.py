"""Makes an engine from a checkpoint: device, dtype, weights and compiled kernels."""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.config import XGenMMConfig
from xgenmm.engine.device import resolve_device, use_device
from xgenmm.engine.engine import MAX_NUM_SEQS, Engine
from xgenmm.engine.scheduler import SchedulerConfig
from xgenmm.errors import InputError
from xgenmm.kernels.cuda_graphs import MAX_ROWS, compile_kernels
from xgenmm.models.quantization import check_quantization
from xgenmm.models.vision import fuse_attention
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_folder: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
    cache_bytes: int | None = None,
    quantize: str | None = None,
    prefill_batches_per_step: int = 1,
) -> Engine:
    """Load an engine from a released name, `demo`, or a checkpoint folder.

    Args:
        name_or_folder: see `xgenmm list`.
        device: `cpu`, `cuda` or `cuda:N`; by default the GPU if there is one.
        dtype: of weights and activations; by default bfloat16 on a GPU and float32 on a CPU.
        max_num_seqs: maximum number of requests answered at once; others wait. Fewer if their
            KV cache does not fit half of the free memory.
        cache_bytes: memory for images and prompts cached between requests; by default an eighth
            of the free memory, at most 4 GB.
        quantize: `int8` or `fp8` for the decoder's linear layers; by default neither.
        prefill_batches_per_step: batches of images or prompt chunks between two decode steps. One
            keeps streams even; more raise throughput.

    Raises:
        CheckpointError: the checkpoint is missing or broken; the message says how to get it.
        InputError: the device, dtype or quantization is not available, or `max_num_seqs` is less
            than 1.
    """
    if max_num_seqs < 1:
        raise InputError("max_num_seqs", f"must be at least 1, not {max_num_seqs}")
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
    tokenizer = Tokenizer.from_folder(folder, config.text.convention, config.additional_ids)
    model = _load_model(config, folder, target, weights_dtype, quantize, max_num_seqs)
    scheduler_config = SchedulerConfig.for_device(target.type, prefill_batches_per_step)
    engine = Engine(model, tokenizer, max_num_seqs, cache_bytes, scheduler_config)
    logger.info(
        "%s: ready on %s in %s with %d slots after %.1f s",
        folder.name, target, quantize or weights_dtype, engine.max_num_seqs,
        time.monotonic() - started,
    )  # fmt: skip
    return engine


def _load_model(
    config: XGenMMConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
    max_num_seqs: int,
) -> XGenMM:
    """Read the weights and, on a GPU, compile the decode kernels at the same time."""
    with torch.device("meta"):
        model = XGenMM(config)
    with ThreadPoolExecutor(1, initializer=use_device, initargs=(device,)) as executor:
        compiled = None
        if device.type == "cuda":
            rows = min(max_num_seqs, MAX_ROWS)
            compiled = executor.submit(compile_kernels, config, rows, dtype, quantize)
        load_parameters(model, folder, device=device, dtype=dtype, quantize=quantize)
        fuse_attention(model.vlm.vision_encoder)
        if compiled is not None:
            compiled.result()
    return model


def _dtype(wanted: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if wanted is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in DTYPES:
        raise InputError("dtype", f"{wanted!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[wanted]
