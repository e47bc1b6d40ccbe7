"""WebDataset tars as INPUT: the files of a sample share a key, e.g. `0.jpg`, `0.txt`, `0.json`."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from xgenmm.captioning.images import IMAGE_SUFFIXES
from xgenmm.captioning.records import Record, escape_surrogates
from xgenmm.captioning.templates import Columns


def read_tars(root: Path, paths: Sequence[Path], column: str) -> Iterator[tuple[Record, Columns]]:
    """Yield the record and the columns of each sample in `paths`, which are below `root`.

    The columns are `key`, `txt`, the fields of the sample's .json, and `column` for the image.
    """
    for path in paths:
        name = path.relative_to(root).as_posix()
        key_counts = Counter[str]()
        try:
            with tarfile.open(path, "r:") as tar:
                files = (member for member in tar if member.isreg())
                for key, members in groupby(files, lambda member: _split(member.name)[0]):
                    key_counts[key] += 1
                    repeat = f"#{key_counts[key]}" if key_counts[key] > 1 else ""
                    record, columns = _read_sample(tar, list(members), column)
                    id_ = escape_surrogates(f"{name}/{key}{repeat}")
                    yield replace(record, id=id_), {"key": key, **columns}
        except (tarfile.TarError, OSError) as error:
            # The rest of this tar is skipped; the tars after it are still read.
            message = f"INPUT: {path} is damaged or not a tar file ({error}); the rest is skipped"
            yield Record(f"{name}/", "", "", error=message), {}


def _split(name: str) -> tuple[str, str]:
    """Split a member's path into key and extension, at the first dot of the file name."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _read_sample(
    tar: tarfile.TarFile, members: Sequence[tarfile.TarInfo], column: str
) -> tuple[Record, Columns]:
    """Return the record, still without an id, and the columns of one sample."""
    columns: dict[str, Any] = {}
    image: tarfile.TarInfo | None = None
    for member in members:
        extension = _split(member.name)[1]
        if extension in ("txt", "json"):
            try:
                columns |= _parse_columns(extension, _read_member(tar, member))
            except ValueError as error:
                message = f"INPUT: cannot read {member.name} ({error})"
                return Record("", "", "", error=message), {column: ""}
        elif image is None and f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            image = member
    if image is None:
        message = f"image: the sample of {members[0].name} has no image"
        return Record("", "", "", error=message), columns
    columns[column] = image.name
    name = escape_surrogates(image.name)
    return Record("", name, str(tar.name), image.offset_data, image.size), columns


def _parse_columns(extension: str, content: bytes) -> Columns:
    """Return the columns in a sample's .txt or .json. Raises ValueError."""
    if extension == "txt":
        return {"txt": content.decode()}
    columns = json.loads(content)
    if not isinstance(columns, dict):
        raise ValueError(f"it must contain a JSON object, not {type(columns).__name__}")
    return columns


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""
