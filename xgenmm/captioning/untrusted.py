"""Read files that may be damaged or hostile: each problem is an OSError or a ValueError."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

MAX_TEXT_CHARS = 300
"""Longer texts are shortened in error messages."""


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, see `check_regular`."""
    check_regular(path)
    return path.open("rb")


def check_regular(path: Path) -> None:
    """Raise OSError if a file does not exist or is not a regular file.

    A FIFO or a terminal would wait for someone to write; a device may never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")


def read_lines(file: IO[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines of a file, and None for a line of more than `max_bytes`."""
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        yield None
        while not line.endswith(b"\n") and (line := file.readline(max_bytes)):
            pass


def parse_json_object(content: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises ValueError for anything else; the message continues a sentence: "this line is ...".
    """
    try:
        parsed = json.loads(content)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"not a JSON object but a {type(parsed).__name__}")
    return parsed


def shorten(text: str) -> str:
    """Return a text on one line, cut if it is too long for an error message."""
    text = " ".join(text.split())
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]}... ({len(text)} characters)"
