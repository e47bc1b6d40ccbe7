"""Tables as INPUT: JSON Lines, CSV and Parquet with a column of image paths or URLs."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from xgenmm.captioning.media import is_url
from xgenmm.captioning.records import Record, escape_surrogates
from xgenmm.captioning.templates import Columns
from xgenmm.captioning.untrusted import (
    check_regular,
    open_file,
    parse_json_object,
    read_lines,
    shorten,
)
from xgenmm.errors import InputError

PARQUET_BATCH_ROWS = 1024
MAX_LINE_LENGTH = 2**24
"""Bytes of a line of JSON, characters of a line and of a cell in CSV."""


def read_table(path: Path, column: str, used: frozenset[str]) -> Iterator[tuple[Record, Columns]]:
    """Yield the record and the columns of each row; `column` holds the path or URL.

    Paths are relative to the table's folder.

    Args:
        used: the columns that questions need. The cells of others may be left out (None).

    Raises InputError if the file cannot be read further.
    """
    rows = TABLE_READERS[path.suffix](path, used | {column})
    for number, columns in enumerate(rows):
        id_ = str(number)
        if isinstance(columns, str):
            yield Record(id_, "", "", error=columns), {}
            continue
        image = columns.get(column)
        if not isinstance(image, str) or not image:
            error = f"image: this row has no path or URL in column {column!r}"
            yield Record(id_, "", "", error=error), columns
            continue
        source = image if is_url(image) else str(path.parent / image)
        yield Record(id_, escape_surrogates(image), source), columns


def import_pyarrow() -> tuple[ModuleType, ModuleType]:
    """Return pyarrow and pyarrow.parquet. Raises InputError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(
            "format", "Parquet needs pyarrow; run `pip install pyarrow`, or use JSON Lines"
        ) from error
    return pyarrow, pyarrow.parquet


def _read_jsonl(path: Path, _: frozenset[str]) -> Iterator[Columns | str]:
    """Yield the object on each line, or the error of a line that has none."""
    with open_file(path) as file:
        for line in read_lines(file, MAX_LINE_LENGTH):
            if line is None:
                yield f"INPUT: this line has more than the {MAX_LINE_LENGTH} bytes allowed"
                continue
            try:
                yield parse_json_object(line)
            except ValueError as error:
                yield f"INPUT: this line is {error}"


def _read_csv(path: Path, _: frozenset[str]) -> Iterator[Columns]:
    csv.field_size_limit(MAX_LINE_LENGTH)
    with open_file(path) as binary:
        file = io.TextIOWrapper(binary, "utf-8-sig", errors="backslashreplace", newline="")
        rows = csv.DictReader(_csv_lines(file))
        try:
            for row in rows:
                row.pop(None, None)  # cells beyond the last column
                yield row
        except csv.Error as error:
            raise InputError("INPUT", f"{path}, line {rows.line_num}: {error}") from error


def _csv_lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE_LENGTH + 1):
        if len(line) > MAX_LINE_LENGTH:
            raise csv.Error(f"the line after it has more than {MAX_LINE_LENGTH} characters")
        yield line


def _read_parquet(path: Path, used: frozenset[str]) -> Iterator[Columns | str]:
    """Yield rows in which only the used columns have values, or the error of a row."""
    pyarrow, parquet = import_pyarrow()
    number = 0
    try:
        check_regular(path)
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            unused = dict.fromkeys(names)
            if not (columns := [name for name in names if name in used]):
                yield unused  # without values, but it tells which columns there are
                return
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                for row in _parquet_rows(batch):
                    yield row if isinstance(row, str) else {**unused, **row}
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        problem = f"{path} is damaged or not a Parquet file, after row {number}"
        raise InputError("INPUT", f"{problem}: {shorten(str(error))}") from error


def _parquet_rows(batch: Any) -> list[Columns | str]:
    """Return the rows of a pyarrow batch, or the error of one that Python cannot represent."""
    try:
        rows: list[Columns | str] = batch.to_pylist()
    except Exception:  # times and time zones alone raise several kinds
        if batch.num_rows == 1:
            return [_cell_error(batch)]
        slices = (batch.slice(number, 1) for number in range(batch.num_rows))
        return [row for one_row in slices for row in _parquet_rows(one_row)]
    return rows


def _cell_error(row: Any) -> str:
    """Return the error of the first cell of a row that Python cannot represent."""
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.to_pylist()
        except Exception as error:
            kind, reason = shorten(str(column.type)), shorten(str(error))
            return f"INPUT: cannot read the {kind} in column {name!r} of this row ({reason})"
    return f"INPUT: two columns have the same name among {row.schema.names}"


TABLE_READERS: Mapping[str, Callable[[Path, frozenset[str]], Iterable[Columns | str]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
