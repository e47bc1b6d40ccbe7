"""Tables as INPUT: JSON Lines, CSV and Parquet with a column of image paths or URLs."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from xgenmm.captioning.images import is_url
from xgenmm.captioning.records import Record, escape_surrogates
from xgenmm.captioning.templates import Columns
from xgenmm.errors import InputError

PARQUET_BATCH_ROWS = 1024
MAX_CSV_FIELD_CHARS = 2**24


def read_table(path: Path, column: str) -> Iterator[tuple[Record, Columns]]:
    """Yield the record and the columns of each row; `column` holds the image's path or URL.

    Paths are relative to the table's folder. Raises InputError if the file cannot be read further.
    """
    for number, columns in enumerate(TABLE_READERS[path.suffix](path)):
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


def _read_jsonl(path: Path) -> Iterator[Columns | str]:
    """Yield the object on each line, or the error of a line that has none."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError as error:
                yield f"INPUT: this line is not valid JSON ({error})"
                continue
            yield row if isinstance(row, dict) else "INPUT: this line is not a JSON object"


def _read_csv(path: Path) -> Iterator[Columns]:
    csv.field_size_limit(MAX_CSV_FIELD_CHARS)
    with path.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                row.pop(None, None)  # cells beyond the last column
                yield row
        except csv.Error as error:
            raise InputError("INPUT", f"{path}, line {rows.line_num}: {error}") from error


def _read_parquet(path: Path) -> Iterator[Columns]:
    pyarrow, parquet = import_pyarrow()
    try:
        for batch in parquet.ParquetFile(path).iter_batches(PARQUET_BATCH_ROWS):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError("INPUT", f"{path} is damaged or not a Parquet file: {error}") from error


TABLE_READERS: Mapping[str, Callable[[Path], Iterable[Columns | str]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
