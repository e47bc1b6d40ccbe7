"""Verification: a manifest in each checkpoint folder records its origin, file sizes and digests."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xgenmm.checkpoints.registry import FileRecord
from xgenmm.errors import CheckpointError
from xgenmm.files import read_json_object, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def verify(folder: Path, records: Mapping[str, FileRecord]) -> bool:
    """Check a folder's files against its manifest and `records`; log a line for each file.

    Headers and index of the parameter files are checked too. Returns whether everything is right.
    Raises CheckpointError if there is neither a manifest nor a record.
    """
    # Needs PyTorch, which takes seconds to import; the rest of this module does not.
    from xgenmm.checkpoints.loading import stored_tensors

    expected = {**records_from_json(read_if_present(folder / MANIFEST).get("files", {})), **records}
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


def is_checkpoint_file(name: str) -> bool:
    """Whether a file is part of a checkpoint: no code, no pickles, nothing in subfolders."""
    return (
        Path(name).name == name
        and name != MANIFEST
        and (name.endswith((".json", ".safetensors")) or name == "tokenizer.model")
    )


def measure(path: Path) -> FileRecord:
    """Return the record of an existing file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def find_problem(path: Path, expected: FileRecord) -> str | None:
    """Return how a file differs from its record, or None."""
    if not path.is_file():
        return "it is missing"
    size = path.stat().st_size
    if size != expected.size:  # saves reading gigabytes
        return difference(FileRecord(size, ""), expected)
    return difference(measure(path), expected)


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


def records_from_json(records: Mapping[str, Mapping[str, Any]]) -> dict[str, FileRecord]:
    """Return records from the JSON objects of `records_to_json`."""
    return {name: FileRecord(**record) for name, record in records.items()}


def read_if_present(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that this package wrote, or {} if there is no such file.

    Raises CheckpointError if it is not a JSON object.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{error}; delete it") from error


def format_size(size: int) -> str:
    """Format a number of bytes for display: `4.98 GB`, `0.51 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 10**7 else f"{size / 1e6:.2f} MB"
