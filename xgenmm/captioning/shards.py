"""OUTPUT: a folder of Parquet or JSON Lines shards that only one process writes to at a time.

A shard appears whole or not at all, and the rows of a record are always in the same shard, so an
interrupted run can be continued with the records whose rows are missing.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from xgenmm.captioning.records import Record, Row, escape_surrogates
from xgenmm.captioning.tables import import_pyarrow
from xgenmm.errors import InputError
from xgenmm.files import atomic_write, lock_folder, read_json_object, write_json

SETTINGS_FILE = "_settings.json"
"""What the shards were made with. Readers of Parquet folders ignore names that begin with `_`."""


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
        read_images = _read_parquet_images if format_ == "parquet" else _read_jsonl_images
        for path in folder.glob(f"part-*.{format_}"):
            self.images.update(read_images(path))
            number = int(path.stem.removeprefix("part-"))
            self._next_number = max(self._next_number, number + 1)

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
        with atomic_write(path) as file:
            write(file, self._rows)
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
    has_other_files = any(file != path for file in folder.iterdir())
    if has_other_files and not path.exists():
        raise InputError("OUTPUT", f"{folder} contains other files; choose another folder")
    if not has_other_files:  # a lone settings file is left by a run without a complete shard
        write_json(path, settings)
    try:
        saved = read_json_object(path)
    except ValueError as error:
        raise InputError("OUTPUT", f"{error}; choose another OUTPUT") from error
    current = json.loads(json.dumps(settings))  # with lists for tuples, as in the file
    for name, value in current.items():
        if saved.get(name) != value:
            raise InputError(
                "OUTPUT",
                f"{folder} was made with {name} {saved.get(name)!r}, not {value!r}; choose another "
                "OUTPUT, or use the same settings to continue this one",
            )


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


def _read_jsonl_images(path: Path) -> dict[str, str]:
    """Return the image of each record in a shard, by its id."""
    with path.open("rb") as file:
        return {row["id"]: row["image"] for row in map(json.loads, file)}


def _read_parquet_images(path: Path) -> dict[str, str]:
    """Return the image of each record in a shard, by its id."""
    parquet = import_pyarrow()[1]
    table = parquet.read_table(path, columns=["id", "image"])
    return dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
