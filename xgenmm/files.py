"""Reading and writing small files without losing them or leaving them half-written.

Shared by checkpoints, the tokenizer and datasets. Needs nothing but the standard library.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises OSError if the file cannot be read (FileNotFoundError if it does not exist), and
    ValueError, naming the file, if it does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object, not {type(content).__name__}")
    return content


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, atomically (see `atomic_write`)."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    After a crash at any moment `path` holds the old content or the new one, never a part of either.
    The temporary file is `_NAME.partial` beside it, which readers of Parquet folders ignore.
    """
    partial = path.with_name(f"_{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)  # so that the new name survives a power failure too


def sync(path: Path) -> None:
    """Flush a file or folder from the system's page cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on an existing folder until the block or the process ends.

    Raises BlockingIOError if another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
