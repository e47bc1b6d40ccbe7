"""Datasets in and out: images with their questions from INPUT, rows of answers to OUTPUT.

INPUT is a folder of images, a table (JSONL, CSV, Parquet) with a column of paths or addresses, or
WebDataset tars. It is listed as `Record`s, without opening an image; `read_record` opens one.
OUTPUT is a folder of `Shards`. Knows nothing of models and engines.
"""

import csv
import fcntl
import functools
import json
import os
import string
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby, takewhile
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import httpx
from PIL import Image

from xgenmm.errors import InputError
from xgenmm.preprocessing.images import read_image

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
)
MAX_DOWNLOAD, MAX_SECONDS, SILENCE = 200_000_000, 120.0, 30.0
"""Of an image behind an address: its bytes, the seconds it may take, and those without a byte."""

Columns = Mapping[str, Any]
PARQUET_BATCH = 1024
CSV_FIELD_BYTES = 2**24


@dataclass(frozen=True)
class Record:
    """One image of INPUT and what is asked about it.

    id: the same in every run and unique in INPUT: the path in a folder, the number of a table's
        row (from 0), `TAR/KEY`.
    image: the image as INPUT names it.
    source: the file or http(s) address that holds it.
    offset, size: its bytes in `source`; all of them if `size` is None.
    questions: the templates, filled with the columns of its row.
    error: why nothing can be asked, known from the listing alone; the templates are then unfilled.
    """

    id: str
    image: str
    source: str
    offset: int = 0
    size: int | None = None
    questions: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """One question and its answer, as OUTPUT has it; with an `error` there is no text."""

    id: str
    image: str
    question: str
    text: str | None = None
    prompt_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    stop_reason: str | None = None
    error: str | None = None


# Questions


def literal(question: str) -> str:
    """The template that stands for `question` as it is."""
    return question.replace("{", "{{").replace("}", "}}")


def template_columns(template: str) -> list[str]:
    """The columns that a template names. Raises InputError for what is no template."""
    return [name for _, name in _template_pieces(template) if name is not None]


def _template_pieces(template: str) -> list[tuple[str, str | None]]:
    """(text, the column after it) pairs."""
    advice = "write {column}, and {{ or }} for a brace"
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError("template", f"{template!r}: {error}; {advice}") from error
    for _, name, spec, conversion in pieces:
        if name == "" or spec or conversion:
            raise InputError("template", f"{template!r} has braces without a plain name; {advice}")
    return [(text, name) for text, name, _, _ in pieces]


def _filled(template: str, columns: Columns) -> str:
    return "".join(
        text + (_as_text(columns[name]) if name is not None else "")
        for text, name in _template_pieces(template)
    )


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _asked(record: Record, columns: Columns, templates: Sequence[str]) -> Record:
    missing = {name for t in templates for name in template_columns(t)} - columns.keys()
    if record.error or missing:
        error = record.error or f"template: this row has no {' and no '.join(sorted(missing))}"
        return replace(record, questions=tuple(templates), error=error)
    return replace(record, questions=tuple(_filled(t, columns) for t in templates))


# Input


def count_records(source: str, templates: Sequence[str], column: str) -> int:
    """How many records INPUT has.

    Raises InputError for an INPUT that cannot be listed or holds nothing, and for a column that no
    row of it has.
    """
    count, names, first = 0, set[str](), None
    for record, columns in _samples(source, column):
        first = first or record
        count += 1
        names |= columns.keys()
    if first is None:
        raise InputError("INPUT", f"{source} holds no image")
    if not names:
        problem = str(first.error).removeprefix("INPUT: ")
        raise InputError("INPUT", f"nothing in {source} can be read; the first row: {problem}")
    wanted = [("image-column", column)]
    wanted += [("template", name) for template in templates for name in template_columns(template)]
    for option, name in wanted:
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise InputError(option, f"{source} has no column {name!r}; it has {known}")
    return count


def read_records(source: str, templates: Sequence[str], column: str) -> Iterator[Record]:
    """The records of INPUT, in an order that does not change, each asked all `templates`.

    Args:
        source: a folder of images or tars, a table, a tar, or a pattern (`*.tar`) of tars.
        templates: questions with the names of columns in braces. A folder has the column `image`;
            tars have `image`, `key`, `txt`, and the fields of an image's .json.
        column: the table's column of paths (from the table's folder on) or addresses.
    """
    for record, columns in _samples(source, column):
        yield _asked(record, columns, templates)


def _samples(source: str, column: str) -> Iterator[tuple[Record, Columns]]:
    path = Path(source).absolute()  # Ray's workers are at home elsewhere
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        return _from_tars(path, tars, column) if tars else _from_folder(path, column)
    if path.suffix == ".tar":
        root, tars = _matching(path)
        if tars:
            return _from_tars(root, tars, column)
    if not path.is_file():
        raise InputError("INPUT", f"there is no {source}; give a folder, a table or .tar files")
    if path.suffix not in _TABLES:
        known = ", ".join(_TABLES)
        raise InputError("INPUT", f"{source} is no table ({known}), no .tar and no folder")
    return _from_table(path, column)


def _matching(pattern: Path) -> tuple[Path, list[Path]]:
    """The files that a pattern means, and the folder, free of wildcards, that they are below."""
    if pattern.exists():
        return pattern.parent, [pattern]
    root = Path(*takewhile(lambda part: not set("*?[") & set(part), pattern.parent.parts))
    return root, sorted(root.glob(str(pattern.relative_to(root))))


def _from_folder(folder: Path, column: str) -> Iterator[tuple[Record, Columns]]:
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    for path in sorted(p for p in paths if p.is_file()):
        name = path.relative_to(folder).as_posix()
        shown = _unicode(name)
        error = None if shown == name else "image: the file's name is not UTF-8; rename it"
        yield Record(shown, shown, "" if error else str(path), error=error), {column: shown}


def _from_table(path: Path, column: str) -> Iterator[tuple[Record, Columns]]:
    for number, columns in enumerate(_TABLES[path.suffix](path)):
        id_ = str(number)
        if isinstance(columns, str):
            yield Record(id_, "", "", error=columns), {}
            continue
        image = columns.get(column)
        if not isinstance(image, str) or not image:
            error = f"image: the column {column!r} of this row holds no path and no address"
            yield Record(id_, "", "", error=error), columns
            continue
        source = image if _is_address(image) else str(path.parent / image)
        yield Record(id_, _unicode(image), source), columns


def _jsonl_rows(path: Path) -> Iterator[Columns | str]:
    """The objects of a file's lines; for another line what is wrong with it."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError as error:
                yield f"INPUT: this line is no JSON ({error})"
                continue
            yield row if isinstance(row, dict) else "INPUT: this line is no JSON object"


def _csv_rows(path: Path) -> Iterator[Columns]:
    csv.field_size_limit(CSV_FIELD_BYTES)
    with path.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        rows = csv.DictReader(file)
        try:
            for row in rows:
                row.pop(None, None)  # what stands behind the last column
                yield row
        except csv.Error as error:
            raise InputError("INPUT", f"{path}, line {rows.line_num}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Columns]:
    arrow, parquet = _arrow()
    try:
        for batch in parquet.ParquetFile(path).iter_batches(PARQUET_BATCH):
            yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise InputError("INPUT", f"{path} is no Parquet file or is damaged: {error}") from error


_TABLES: Mapping[str, Callable[[Path], Iterable[Columns | str]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _from_tars(root: Path, paths: Sequence[Path], column: str) -> Iterator[tuple[Record, Columns]]:
    for path in paths:
        name = path.relative_to(root).as_posix()
        seen = Counter[str]()
        try:
            with tarfile.open(path, "r:") as tar:
                files = (member for member in tar if member.isreg())
                for key, members in groupby(files, lambda member: _split(member.name)[0]):
                    seen[key] += 1
                    repeated = f"#{seen[key]}" if seen[key] > 1 else ""
                    record, columns = _from_members(tar, list(members), column)
                    id_ = _unicode(f"{name}/{key}{repeated}")
                    yield replace(record, id=id_), {"key": key, **columns}
        except (tarfile.TarError, OSError) as error:
            # The rest of the tar is lost, the tars after it are not.
            message = f"INPUT: {path} is no tar or is damaged ({error}); its rest is missing"
            yield Record(f"{name}/", "", "", error=message), {}


def _split(name: str) -> tuple[str, str]:
    """A member's key and its extension, which starts at the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    base, _, extension = file.partition(".")
    return (f"{folder}/{base}" if folder else base), extension.lower()


def _from_members(
    tar: tarfile.TarFile, members: Sequence[tarfile.TarInfo], column: str
) -> tuple[Record, Columns]:
    """One sample: the files of a tar that share a key. The record has no id yet."""
    columns: dict[str, Any] = {}
    file: tarfile.TarInfo | None = None
    for member in members:
        extension = _split(member.name)[1]
        if extension in ("txt", "json"):
            try:
                columns |= _fields(extension, _content(tar, member))
            except ValueError as error:
                message = f"INPUT: {member.name} cannot be read ({error})"
                return Record("", "", "", error=message), {column: ""}
        elif file is None and f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            file = member
    if file is None:
        message = f"image: there is no image beside {members[0].name}"
        return Record("", "", "", error=message), columns
    columns[column] = file.name
    return Record("", _unicode(file.name), str(tar.name), file.offset_data, file.size), columns


def _fields(extension: str, content: bytes) -> Columns:
    """The columns in a sample's .txt or .json. Raises ValueError."""
    if extension == "txt":
        return {"txt": content.decode()}
    columns = json.loads(content)
    if not isinstance(columns, dict):
        raise ValueError("it holds no object")
    return columns


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def read_record(record: Record) -> Image.Image:
    """Read a record's image: upright RGB. Raises InputError if it cannot be had."""
    try:
        if _is_address(record.source):
            return read_image(_download(record.source))
        with Path(record.source).open("rb") as file:
            if record.size is None:
                return read_image(file)
            file.seek(record.offset)
            return read_image(file.read(record.size))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise InputError("image", f"cannot read {record.source!r} ({error})") from error


def _unicode(text: str) -> str:
    """`text` with escapes for what has no UTF-8: half characters, bytes of odd file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _download(address: str) -> bytes:
    content, started = bytearray(), time.monotonic()
    try:
        with _client().stream("GET", address) as response:
            if response.status_code != httpx.codes.OK:
                raise InputError("image", f"{address} answers with HTTP {response.status_code}")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_DOWNLOAD:
                    raise InputError("image", f"{address} has more than {MAX_DOWNLOAD} bytes")
                if time.monotonic() - started > MAX_SECONDS:
                    raise InputError("image", f"{address} takes longer than {MAX_SECONDS:.0f} s")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError("image", f"cannot fetch {address} ({error})") from error
    return bytes(content)


@functools.cache
def _client() -> httpx.Client:
    return httpx.Client(
        follow_redirects=True, timeout=SILENCE, limits=httpx.Limits(max_connections=None)
    )


# Output


@contextmanager
def open_shards(
    folder: Path, format_: str, shard_rows: int, settings: Mapping[str, Any]
) -> Iterator["Shards"]:
    """OUTPUT, opened by one process at a time. What is left is written at the end, come what may.

    `_settings.json` says what made the shards. Its name and those of unfinished shards begin with
    `_`, which readers of Parquet folders pass over.

    Args:
        folder: made if need be.
        format_: `parquet` or `jsonl`.
        shard_rows: rows after which a shard is written.
        settings: what every row depends on, as JSON knows it.

    Raises InputError for a folder that cannot be made, or is of something else, of other settings,
    or of another process.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("OUTPUT", f"{folder} is a file; give the name of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("OUTPUT", f"the folder {folder} cannot be made ({error})") from error
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError("OUTPUT", f"another process writes to {folder}") from error
        for unfinished in folder.glob("_*.partial"):
            unfinished.unlink()
        _check_settings(folder, {"format": format_, **settings})
        shards = Shards(folder, format_, shard_rows)
        try:
            yield shards
        finally:
            shards.flush()
    finally:
        os.close(lock)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "_settings.json"
    others = any(other != path for other in folder.iterdir())
    if others and not path.exists():
        raise InputError("OUTPUT", f"{folder} holds other files; choose another one")
    if not others:  # what was there may be of a start that failed for its settings
        text = json.dumps(settings, indent=2) + "\n"
        _write_file(path, lambda file: file.write(text.encode()))
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))  # as it reads from a file
    for name in now:
        if before.get(name) != now[name]:
            raise InputError(
                "OUTPUT",
                f"{folder} was made with {name} {before.get(name)!r}, not {now[name]!r}; choose "
                "another OUTPUT, or the same settings to go on with this one",
            )


class Shards:
    """A folder of shards, each a file that is there as a whole or not at all.

    done: by id the image of each record whose rows are there or were added. The rows of a record
        are added at once, so a record is never half done.
    """

    def __init__(self, folder: Path, format_: str, shard_rows: int) -> None:
        self.done: dict[str, str] = {}
        self._folder = folder
        self._format = format_
        self._shard_rows = shard_rows
        self._rows: list[Row] = []
        self._next = 0
        read = _read_parquet if format_ == "parquet" else _read_jsonl
        for path in folder.glob(f"part-*.{format_}"):
            self.done.update(read(path))
            self._next = max(self._next, 1 + int(path.stem.removeprefix("part-")))

    def add(self, rows: Sequence[Row]) -> None:
        """Take all rows of one record."""
        self._rows += rows
        self.done[rows[0].id] = rows[0].image
        if len(self._rows) >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are in no shard yet into a last one."""
        if not self._rows:
            return
        path, rows = self._folder / f"part-{self._next:05}.{self._format}", self._rows
        write = _write_parquet if self._format == "parquet" else _write_jsonl
        _write_file(path, lambda file: write(file, rows))
        self._rows = []
        self._next += 1

    def missing(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records that are not done. Raises InputError for one that is not what it was."""
        for record in records:
            image = self.done.get(record.id)
            if image is None:
                yield record
            elif image != record.image:
                raise InputError(
                    "OUTPUT",
                    f"{self._folder} has {image!r} for row {record.id}, which now is "
                    f"{record.image!r}: INPUT has changed; choose another OUTPUT",
                )


def _write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Make a file at once: after a crash at any moment it is there as a whole or not at all."""
    draft = path.with_name(f"_{path.name}.partial")
    with draft.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _cells(row: Row) -> dict[str, Any]:
    cells = asdict(row).items()
    return {name: _unicode(cell) if isinstance(cell, str) else cell for name, cell in cells}


def _write_jsonl(file: IO[bytes], rows: Sequence[Row]) -> None:
    for row in rows:
        file.write(json.dumps(_cells(row), ensure_ascii=False).encode() + b"\n")


def _read_jsonl(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return {row["id"]: row["image"] for row in map(json.loads, file)}


def _write_parquet(file: IO[bytes], rows: Sequence[Row]) -> None:
    arrow, parquet = _arrow()
    schema = arrow.schema(
        {
            field.name: arrow.int32() if field.type is int else arrow.string()
            for field in fields(Row)  # so that a column without any value has its type too
        }
    )
    parquet.write_table(arrow.Table.from_pylist([_cells(row) for row in rows], schema), file)


def _read_parquet(path: Path) -> dict[str, str]:
    table = _arrow()[1].read_table(path, columns=["id", "image"])
    return dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))


def _arrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and pyarrow.parquet; JSONL and CSV do without them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(
            "format", "Parquet needs pyarrow: pip install -r requirements-data.txt, or use jsonl"
        ) from error
    return pyarrow, pyarrow.parquet
