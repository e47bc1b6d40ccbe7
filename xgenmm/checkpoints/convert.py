"""Conversion of a checkpoint to bfloat16: half the size of float32, and faster to load."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from xgenmm.checkpoints.loading import INDEX, StoredTensor, new_buffer, read_tensor, stored_tensors
from xgenmm.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    Records,
    find_problem,
    format_size,
    is_checkpoint_file,
    measure,
    read_if_present,
    records_to_json,
    write_manifest,
)
from xgenmm.checkpoints.registry import CONVERTED, FileRecord
from xgenmm.checkpoints.staging import check_free_disk, disk_full, staging_folder
from xgenmm.errors import CheckpointError
from xgenmm.files import MAX_BYTES, open_file, sync, write_json

logger = logging.getLogger(__name__)

PROGRESS = ".progress"
SHARD_BYTES = 2 * 10**9


def convert(source: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a bfloat16 copy of the checkpoint folder `source` next to it; return NAME-bf16.

    Integer tensors keep their dtype. Files of up to about `shard_bytes` bytes are written one after
    the other, each from memory; after a kill, the next run keeps the complete ones.

    Raises CheckpointError if the source is corrupt, is in bfloat16 already, or the disk is too
    small.
    """
    tensors = stored_tensors(source)
    if not any(t.dtype.is_floating_point and t.dtype != torch.bfloat16 for t in tensors.values()):
        raise CheckpointError(f"{source}: it is in bfloat16 already; there is nothing to convert")
    target = source.absolute().with_name(f"{source.absolute().name}{CONVERTED}")
    if target.is_dir():
        logger.info("%s exists already", target)
        return target
    copied = [
        path
        for path in sorted(source.iterdir())
        if is_checkpoint_file(path.name) and path.name != INDEX and path.suffix != ".safetensors"
    ]
    for path in copied:
        _check_copy(path)
    shards = _split(list(tensors.values()), shard_bytes)
    with staging_folder(target) as staging:
        # Files from another source or another split cannot be reused.
        plan = {"shard_bytes": shard_bytes, "source": _fingerprint(tensors)}
        records = _write_shards(staging, shards, plan)
        files = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        total = sum(_converted_size(tensor) for tensor in tensors.values())
        write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        for path in copied:
            shutil.copyfile(path, staging / path.name)
        for path in [staging / INDEX, *(staging / path.name for path in copied)]:
            records[path.name] = measure(path)
        manifest = read_if_present(source / MANIFEST, Manifest)
        origin = manifest.model_dump(exclude={"files"}, exclude_none=True) if manifest else {}
        write_manifest(staging, records, **origin, dtype="bfloat16")
        staging.rename(target)
    (target / PROGRESS).unlink()
    logger.info("%s: %s in bfloat16", target, format_size(total))
    return target


class _Progress(BaseModel):
    """Which files an earlier run has written, and the plan that they are part of."""

    plan: dict[str, Any]
    files: Records


def _check_copy(path: Path) -> None:
    """Raise CheckpointError if a file to be copied is not a regular one."""
    try:
        open_file(path, MAX_BYTES).close()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error}; remove it") from error


def _split(tensors: list[StoredTensor], shard_bytes: int) -> dict[str, list[StoredTensor]]:
    """Distribute tensors, in order, to files of at most `shard_bytes` bytes (or one tensor)."""
    shards: list[list[StoredTensor]] = []
    room = 0
    for tensor in tensors:
        size = _converted_size(tensor)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, start=1)}


def _write_shards(
    staging: Path, shards: Mapping[str, list[StoredTensor]], plan: Mapping[str, Any]
) -> dict[str, FileRecord]:
    """Write the files that an earlier run with the same plan did not; return all their records."""
    progress = read_if_present(staging / PROGRESS, _Progress)
    done = progress.files if progress and progress.plan == plan else {}
    done = {n: record for n, record in done.items() if find_problem(staging / n, record) is None}
    for path in staging.iterdir():
        if path.name not in {*done, PROGRESS}:
            path.unlink()
    missing = [tensor for name in shards.keys() - done.keys() for tensor in shards[name]]
    check_free_disk(staging, sum(_converted_size(tensor) for tensor in missing))
    for name, shard in shards.items():
        if name not in done:
            done[name] = _write_bfloat16(staging / name, shard)
            write_json(staging / PROGRESS, {"plan": plan, "files": records_to_json(done)})
        logger.info("%s: %s", name, format_size(done[name].size))
    return done


def _converted_dtype(tensor: StoredTensor) -> torch.dtype:
    return torch.bfloat16 if tensor.dtype.is_floating_point else tensor.dtype


def _converted_size(tensor: StoredTensor) -> int:
    return tensor.size // tensor.dtype.itemsize * _converted_dtype(tensor).itemsize


def _write_bfloat16(path: Path, tensors: list[StoredTensor]) -> FileRecord:
    """Write one safetensors file and return its record."""
    buffer = new_buffer()
    converted = {t.name: read_tensor(t, buffer, _converted_dtype(t)) for t in tensors}
    try:
        save_file(converted, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it has no errno; in practice the disk is full
        raise CheckpointError(disk_full(path, str(error))) from error
    sync(path)
    return measure(path)


def _fingerprint(tensors: Mapping[str, StoredTensor]) -> dict[str, list[int]]:
    """Return what identifies a source: sizes and modification times of its parameter files."""
    paths = {tensor.path for tensor in tensors.values()}
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)}
