"""OUTPUT: a folder of Parquet or JSON Lines shards that only one process writes to at a time.

A shard appears whole or not at all, and the rows of a record are always in the same shard, so an
interrupted run can be continued with the records whose rows are missing.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from xgenmm.captioning.records import Record, Row, escape_surrogates
from xgenmm.captioning.tables import import_pyarrow
from xgenmm.captioning.untrusted import (
    check_regular,
    open_file,
    parse_json_object,
    read_lines,
    shorten,
)
from xgenmm.errors import InputError
from xgenmm.files import atomic_write, lock_folder, write_json

SETTINGS_FILE = "_settings.json"
"""What the shards were made with. Readers of Parquet folders ignore names that begin with `_`."""

MAX_SETTINGS_BYTES = 2**24
MAX_ROW_BYTES = 2**28


class Shards:
    """The shards in a folder.

    images: `Record.image` of each complete record, by `Record.id`. A record is complete when its
        rows are in a shard or were passed to `add`.
    """

    def __init__(self, folder: Path, format_: str, shard_rows: int) -> None:
        self.images: dict[str, str] = {}
        self._folder = folder
        self._format = format_
        self._shard_rows = shard_rows
        self._rows: list[Row] = []
        self._next_number = 0
        if format_ == "parquet":
            import_pyarrow()  # now, so that a missing package is not noticed after a thousand rows
        rows_per_record: int | None = None
        for path in sorted(folder.glob(f"part-*.{format_}")):
            with _naming(path):
                self._next_number = max(self._next_number, _shard_number(path) + 1)
                pairs = list(_read_jsonl(path) if format_ == "jsonl" else _read_parquet(path))
                counts = Counter(id_ for id_, _ in pairs)
                rows_per_record = rows_per_record or next(iter(counts.values()), None)
                if set(counts.values()) != {rows_per_record}:
                    raise ValueError("it is empty, or some of the rows of a record are missing")
                if repeated := self.images.keys() & counts:
                    raise ValueError(f"another shard has rows of {shorten(min(repeated))} too")
                self.images |= pairs

    def add(self, rows: Sequence[Row]) -> None:
        """Add all rows of one record."""
        self._rows += rows
        self.images[rows[0].id] = rows[0].image
        if len(self._rows) >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not in a shard yet to a new one."""
        if not self._rows:
            return
        write = _write_parquet if self._format == "parquet" else _write_jsonl
        path = self._folder / f"part-{self._next_number:05}.{self._format}"
        try:
            with atomic_write(path) as file:
                write(file, self._rows)
        except OSError as error:
            raise InputError("OUTPUT", f"cannot write {path} ({error})") from error
        self._rows = []
        self._next_number += 1

    def pending(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records that are not complete.

        Raises InputError if a complete record now has another image.
        """
        for record in records:
            image = self.images.get(record.id)
            if image is None:
                yield record
            elif image != record.image:
                raise InputError(
                    "OUTPUT",
                    f"INPUT has changed: record {record.id} was {image!r} in {self._folder} and is "
                    f"{record.image!r} now; choose another OUTPUT",
                )


@contextmanager
def open_shards(
    folder: Path, format_: str, shard_rows: int, settings: Mapping[str, Any]
) -> Iterator[Shards]:
    """Open OUTPUT and lock it; the remaining rows are written on exit, even after an error.

    Args:
        folder: created if it does not exist.
        format_: `parquet` or `jsonl`.
        shard_rows: number of rows at which a shard is written.
        settings: everything that the rows depend on; must be serializable as JSON.

    Raises InputError if the folder cannot be created, contains other files, was made with other
    settings, or is in use by another process.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("OUTPUT", f"{folder} is a file; give the name of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("OUTPUT", f"cannot create the folder {folder} ({error})") from error
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder))
        except BlockingIOError as error:
            raise InputError("OUTPUT", f"another process is writing to {folder}") from error
        for partial in folder.glob("_*.partial"):
            partial.unlink()
        _check_settings(folder, {"format": format_, **settings})
        shards = Shards(folder, format_, shard_rows)
        try:
            yield shards
        finally:
            shards.flush()


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new OUTPUT, or compare those of an existing one."""
    path = folder / SETTINGS_FILE
    names = {file.name for file in folder.iterdir()}
    if names and SETTINGS_FILE not in names:
        raise InputError("OUTPUT", f"{folder} contains other files; choose another folder")
    if names <= {SETTINGS_FILE}:  # a lone settings file is left by a run without a complete shard
        write_json(path, settings)
    try:
        with open_file(path) as file:
            saved = parse_json_object(file.read(MAX_SETTINGS_BYTES))
    except (OSError, ValueError) as error:
        problem = f"{path}: {shorten(str(error))}; choose another OUTPUT"
        raise InputError("OUTPUT", problem) from error
    current = json.loads(json.dumps(settings))  # with lists for tuples, as in the file
    for name, value in current.items():
        if saved.get(name) != value:
            was, is_ = shorten(repr(saved.get(name))), shorten(repr(value))
            raise InputError(
                "OUTPUT",
                f"{folder} was made with {name} {was}, not {is_}; choose another OUTPUT, or use "
                "the same settings to continue this one",
            )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the errors of reading a shard into one that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(
            "OUTPUT",
            f"{path} is damaged or not a shard of this program ({shorten(str(error))}); delete it "
            "to have its records answered again, or choose another OUTPUT",
        ) from error


def _shard_number(path: Path) -> int:
    if not (match := re.fullmatch(r"part-([0-9]{5,9})", path.stem)):
        raise ValueError("its name has no number")
    return int(match[1])


def _cells(row: Row) -> dict[str, Any]:
    cells = asdict(row).items()
    return {
        name: escape_surrogates(cell) if isinstance(cell, str) else cell for name, cell in cells
    }


def _write_jsonl(file: IO[bytes], rows: Sequence[Row]) -> None:
    for row in rows:
        file.write(json.dumps(_cells(row), ensure_ascii=False).encode() + b"\n")


def _write_parquet(file: IO[bytes], rows: Sequence[Row]) -> None:
    pyarrow, parquet = import_pyarrow()
    # An explicit schema, because a column of only nulls would have no type.
    schema = pyarrow.schema(
        {
            field.name: pyarrow.int32() if field.type is int else pyarrow.string()
            for field in fields(Row)
        }
    )
    parquet.write_table(pyarrow.Table.from_pylist([_cells(row) for row in rows], schema), file)


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the id and the image of each row in a shard. Raises OSError or ValueError."""
    with open_file(path) as file:
        for number, line in enumerate(read_lines(file, MAX_ROW_BYTES), 1):
            try:
                row = parse_json_object(line or b"")
                yield _text(row.get("id")), _text(row.get("image"))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the id and the image of each row in a shard. Raises OSError or ValueError."""
    pyarrow, parquet = import_pyarrow()
    check_regular(path)
    try:
        with parquet.ParquetFile(path) as file:
            rows = file.read(columns=["id", "image"]).to_pylist()
            yield from ((_text(row["id"]), _text(row["image"])) for row in rows)
    except KeyError as error:
        raise ValueError(f"it has no column {error}") from error
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"an id or image is not a text but {shorten(repr(value))}")
    return value
