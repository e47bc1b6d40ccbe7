"""Verification: a manifest in each checkpoint folder records its origin, file sizes and digests."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel

from xgenmm.checkpoints.registry import FileRecord, RepositoryId, Revision
from xgenmm.errors import CheckpointError
from xgenmm.files import open_file, read_json, write_json

T = TypeVar("T")

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def is_checkpoint_file(name: str) -> bool:
    """Whether a file is part of a checkpoint: no code, no pickles, nothing in subfolders."""
    return name != MANIFEST and (
        re.fullmatch(r"[A-Za-z0-9_.-]{1,200}\.(json|safetensors)", name) is not None
        or name == "tokenizer.model"
    )


def _checkpoint_file(name: str) -> str:
    if not is_checkpoint_file(name):
        raise ValueError("should be the name of a file of a checkpoint")
    return name


Records = dict[Annotated[str, AfterValidator(_checkpoint_file)], FileRecord]


class Manifest(BaseModel):
    """The origin of a checkpoint folder, and the records of its files."""

    name: str | None = None
    repo: RepositoryId | None = None
    revision: Revision | None = None
    files: Records


def verify(folder: Path, records: Mapping[str, FileRecord]) -> bool:
    """Check a folder's files against its manifest and `records`; log a line for each file.

    Headers and index of the parameter files are checked too. Returns whether everything is right.
    Raises CheckpointError if there is neither a manifest nor a record.
    """
    # Needs PyTorch, which takes seconds to import; the rest of this module does not.
    from xgenmm.checkpoints.loading import stored_tensors

    manifest = read_if_present(folder / MANIFEST, Manifest)
    expected = {**(manifest.files if manifest else {}), **records}
    if not expected:
        raise CheckpointError(
            f"{folder}: cannot be verified: it has no {MANIFEST}, and releases.json has no record "
            "of it; download it again"
        )
    logger.info("%s", folder)
    passed = True
    for name, record in sorted(expected.items()):
        problem = find_problem(folder / name, record)
        passed = passed and problem is None
        logger.info("  %-40s %9s  %s", name, format_size(record.size), problem or "ok")
    try:
        logger.info("  %d tensors", len(stored_tensors(folder)))
    except CheckpointError as error:
        passed = False
        logger.info("  %s", error)
    return passed


def write_manifest(
    folder: Path, records: Mapping[str, FileRecord] | None = None, **origin: str
) -> None:
    """Write a folder's manifest: `origin`, and the records of its files (measured if None)."""
    if records is None:
        files = (path for path in folder.iterdir() if is_checkpoint_file(path.name))
        records = {path.name: measure(path) for path in files}
    write_json(folder / MANIFEST, {**origin, "files": records_to_json(records)})


def measure(path: Path) -> FileRecord:
    """Return the record of an existing file; raises as `open_file` does."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        return FileRecord(size, hashlib.file_digest(file, "sha256").hexdigest())


def find_problem(path: Path, expected: FileRecord) -> str | None:
    """Return how a file differs from its record, or None."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != expected.size:  # saves reading gigabytes
            return difference(FileRecord(size, ""), expected)
        return difference(measure(path), expected)
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError) as error:
        return str(error)


def difference(found: FileRecord, expected: FileRecord) -> str | None:
    """Return how two records differ, or None."""
    if found.size != expected.size:
        return f"it has {found.size} bytes, must have {expected.size}"
    if found.sha256 != expected.sha256:
        return f"its sha256 is {found.sha256}, must be {expected.sha256}"
    return None


def records_to_json(records: Mapping[str, FileRecord]) -> dict[str, dict[str, Any]]:
    """Return records as JSON objects, sorted by file name."""
    return {name: asdict(record) for name, record in sorted(records.items())}


def read_if_present(path: Path, kind: type[T]) -> T | None:
    """Return what a JSON file contains that this package wrote, or None if there is no such file.

    Raises CheckpointError if it is something else.
    """
    if not os.path.lexists(path):
        return None
    try:
        return read_json(path, kind)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{error}; delete it") from error


def format_size(size: int) -> str:
    """Format a number of bytes for display: `4.98 GB`, `0.51 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 10**7 else f"{size / 1e6:.2f} MB"
