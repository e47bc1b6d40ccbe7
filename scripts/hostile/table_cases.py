"""Hostile tables as INPUT. Each has a good row before and after the one that is wrong."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from scripts.hostile.files import DEEP_JSON, TERABYTE, png, sparse_file, write_images
from scripts.hostile.runner import Arguments, Case

GOOD = {"image": "images/0.png", "t": "x"}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"
ASK_T = ("--template", "What is {t}?")


def table_cases() -> Iterator[Case]:
    """Yield the cases of all kinds of tables."""
    for name, line in JSON_LINES.items():
        yield _case("JSON Lines", name, "t.jsonl", _lines_around(line), rows=3)
    for name, path in PATHS.items():
        line = json.dumps({"image": path, "t": "x"}).encode()
        errors = None if name == "sparse 1 TB PNG" else 1
        yield _case("paths", name, "t.jsonl", _lines_around(line), rows=3, errors=errors)
    for name, content, rows, errors in CSV_FILES:
        names = () if rows else ("t.csv",)
        yield _case("CSV", name, "t.csv", _bytes(content), rows, errors, names)
    for name, cell in PARQUET_CELLS.items():
        # A cell that cannot be used costs its row, a column that cannot be used ends the program; a
        # question that does not name it is answered.
        named = ("t.parquet",)
        yield _case("Parquet", f"{name} named", "t.parquet", _cell(cell), 3, None, named)
        yield _case(
            "Parquet", f"{name} beside", "t.parquet", _cell(cell), 3, 0, named, template=False
        )
    for name, image in PARQUET_IMAGES.items():
        yield _case("Parquet", name, "t.parquet", _image_column(image), 2, None, ("t.parquet",))
    for name, write in PARQUET_FILES.items():
        yield _case("Parquet", name, "t.parquet", write, None, names=("t.parquet",))


def _case(
    group: str,
    name: str,
    file: str,
    write: Callable[[Path], object],
    rows: int | None = None,
    errors: int | None = 1,
    names: tuple[str, ...] = (),
    *,
    template: bool = True,
) -> Case:
    def build(folder: Path) -> Arguments:
        write_images(folder / "images", 1)
        write(folder / file)
        return [str(folder / file), *(ASK_T if template else ())]

    return Case(group, name, build, rows, errors, names)


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _lines_around(line: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(GOOD_LINE + line + b"\n" + GOOD_LINE)
        os.mkfifo(path.with_name("fifo.png"))
        path.with_name("loop.png").symlink_to("loop.png")
        sparse_file(path.with_name("sparse.png"), TERABYTE, png())
        riff = b"RIFF\xf0\xff\xff\xffWEBPVP8 " + b"\xe0\xff\xff\xff" + bytes(20)
        sparse_file(path.with_name("sparse.webp"), TERABYTE, riff)

    return write


def _row(t: str) -> bytes:
    return b'{"image": "images/0.png", "t": ' + t.encode() + b"}"


def _image(image: str) -> bytes:
    return b'{"t": "x", "image": ' + image.encode() + b"}"


JSON_LINES = {
    "200,000 deep": DEEP_JSON,
    "image 200,000 deep": _image(DEEP_JSON.decode()),
    "t 200,000 deep": _row(DEEP_JSON.decode()),
    "unclosed 10**6 deep": b"[" * 10**6,
    "objects 200,000 deep": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "image of 5,000 digits": _image("1" * 5000),
    "t of 5,000 digits": _row("1" * 5000),
    "invalid UTF-8": b'{"image": "\xff\xfe.png", "t": ""}',
    "NUL": b"\0" * 100,
    "lone surrogate in t": _row('"\\ud800"'),
    "line of 64 MB": _row('"' + "a" * (64 << 20) + '"'),
    "t of 10 MB": _row('"' + "a " * (5 << 20) + '"'),
    "image is a number": _image("3"),
    "image is NaN": _image("NaN"),
    "image is a list": _image('["images/0.png"]'),
    "image is null": _image("null"),
    "image is empty": _image('""'),
    "line is a number": b"3",
    "line is empty": b"",
    "10,000 columns without t": json.dumps(dict.fromkeys(map(str, range(10**4)))).encode(),
}
PATHS = {
    "NUL": "a\0.png",
    "lone surrogate": "\ud800.png",
    "1 MB": "a" * 10**6,
    "folder": "images",
    "FIFO": "fifo.png",
    "/dev/zero": "/dev/zero",
    "/dev/tty": "/dev/tty",
    "/proc/self/mem": "/proc/self/mem",
    "sparse 1 TB PNG": "sparse.png",
    "sparse 1 TB WebP": "sparse.webp",
    "link to itself": "loop.png",
    "above /": "../" * 20 + "etc/passwd",
    "line feed": "a\nb.png",
    "unknown scheme": "ftp://127.0.0.1/a.png",
}
MANY_COLUMNS = b"image," + b",".join(b"%d" % number for number in range(10**4))
CSV_FILES: list[tuple[str, bytes, int | None, int | None]] = [
    ("NUL", b"image,t\nimages/0.png,x\na\0.png,x\nimages/0.png,x\n", 3, 1),
    ("invalid UTF-8", b"image,t\nimages/0.png,x\n\xff.png,x\nimages/0.png,x\n", 3, 1),
    ("more and fewer cells", b"image,t\nimages/0.png,x,y,z\n\nimages/0.png\nimages/0.png,x", 3, 0),
    ("empty", b"", None, None),
    ("header only", b"image,t\n", None, None),
    ("UTF-16", "image,t\nimages/0.png,x\n".encode("utf-16"), None, None),
    ("header twice", b"image,t,image\nimages/0.png,x,none.png\n", 1, None),
    ("quote not closed", b'image,t\nimages/0.png,"x\n' + b"images/0.png,x\n" * 10**6, 1, 1),
    ("quote not closed, 30 MB", b'image,t\nimages/0.png,"x\n' + b"ab,x\n" * (6 << 20), None, None),
    ("cell of 20 MB", b"image,t\nimages/0.png," + b"x" * (20 << 20), None, None),
    ("line of 40 million cells", b"image,t\n" + b"," * (40 << 20), None, None),
    ("10,000 columns without t", MANY_COLUMNS + b"\na,", None, None),
    ("line ends in CR", b"image,t\rimages/0.png,x\rimages/0.png,x\r", 2, 0),
]  # fmt: skip


def _table_of(t: pyarrow.Array) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        images = pyarrow.array([GOOD["image"]] * len(t))
        pyarrow.parquet.write_table(pyarrow.table({"image": images, "t": t}), path)

    return write


def _cell(array: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda path: _table_of(array())(path)


def _timestamps(unit: str, value: int, zone: str | None = None) -> Callable[[], Any]:
    kind = pyarrow.timestamp(unit, zone)
    return lambda: pyarrow.array([0, value, 0], pyarrow.int64()).cast(kind)


def _cast(kind: pyarrow.DataType, value: int) -> Callable[[], Any]:
    bits = pyarrow.int32() if kind == pyarrow.date32() else pyarrow.int64()
    return lambda: pyarrow.array([0, value, 0], bits).cast(kind)


def _invalid_text() -> Any:
    return pyarrow.array([b"x", b"\xff\xfe", b"x"]).cast(pyarrow.string(), safe=False)


def _nested(depth: int) -> Any:
    array = pyarrow.array([1, 2, 3])
    for _ in range(depth):
        array = pyarrow.StructArray.from_arrays([array], ["a"])
    return array


NOW = datetime(2024, 1, 1, tzinfo=UTC)
PARQUET_CELLS: dict[str, Callable[[], Any]] = {
    "year 293,000": _timestamps("us", 9_200_000_000_000_000_000),
    "year -290,000": _timestamps("us", -9_200_000_000_000_000_000),
    "odd nanoseconds": _timestamps("ns", 1_700_000_000_123_456_789),
    "unknown time zone": _timestamps("us", 1, "Mars/Olympus"),
    "time zone ''": _timestamps("us", 1, " "),
    "time zone +99:99": _timestamps("us", 1, "+99:99"),
    "time zone ../../etc/passwd": _timestamps("us", 1, "../../etc/passwd"),
    "time zone of 10,000 letters": _timestamps("us", 1, "x" * 10_000),
    "date beyond year 9999": _cast(pyarrow.date32(), 2**31 - 1),
    "date of milliseconds": _cast(pyarrow.date64(), 2**62),
    "duration of 2**62 s": _cast(pyarrow.duration("s"), 2**62),
    "odd time": _cast(pyarrow.time64("ns"), 1_234_567_891),
    "bytes": lambda: pyarrow.array([b"x", b"\xff\0", None]),
    "text that is not UTF-8": _invalid_text,
    "list of bytes": lambda: pyarrow.array([[b"x"], [b"\xff"], None]),
    "struct of a time": lambda: pyarrow.array([{"a": NOW}, {"a": None}, None]),
    "list of dates and decimals": lambda: pyarrow.array(
        [[{"a": date(2024, 1, 1), "b": Decimal("1.5")}], [], None]
    ),
    "decimal": lambda: pyarrow.array([Decimal("1." + "1" * 30)] * 3),
    "map": lambda: pyarrow.array(
        [[("a", b"x")]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.binary())
    ),
    "dictionary": lambda: pyarrow.array(["x", "y", "x"]).dictionary_encode(),
    "nulls": lambda: pyarrow.nulls(3),
    "struct 100 deep": lambda: _nested(100),
}
PARQUET_IMAGES: dict[str, Callable[[], Any]] = {
    "image is bytes": lambda: pyarrow.array([png(), png()]),
    "image is a struct": lambda: pyarrow.array([{"bytes": png(), "path": "a"}] * 2),
    "image is null": lambda: pyarrow.nulls(2),
    "image is a time": lambda: pyarrow.array([NOW, NOW]),
    "image is not UTF-8": lambda: _invalid_text()[:2],
    "image is a large string": lambda: pyarrow.array(["a", "b"], pyarrow.large_string()),
    "image is a dictionary": lambda: pyarrow.array(["a", "a"]).dictionary_encode(),
}


def _image_column(array: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda path: pyarrow.parquet.write_table(
        pyarrow.table({"image": array(), "t": ["x", "x"]}), path
    )


def _good_parquet(path: Path, rows: int = 3000) -> bytes:
    table = pyarrow.table({"image": [GOOD["image"]] * rows, "t": [f"x{n}" for n in range(rows)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1000, write_page_checksum=True)
    return path.read_bytes()


def _damaged(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = bytearray(_good_parquet(path))
        change(content)
        path.write_bytes(content)

    return write


def _flip(start: int, stop: int) -> Callable[[bytearray], None]:
    def flip(content: bytearray) -> None:
        for at in range(start % len(content), stop % len(content)):
            content[at] ^= 0xFF

    return flip


def _long_footer(content: bytearray) -> None:
    content[-8:-4] = b"\xff\xff\xff\x7f"


def _written(columns: dict[str, Any]) -> Callable[[Path], None]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _clear_half(content: bytearray) -> None:
    del content[len(content) // 2 :]


def _same_names(path: Path) -> None:
    column = pyarrow.array([GOOD["image"]])
    table = pyarrow.Table.from_arrays([column, column], ["image", "image"])
    pyarrow.parquet.write_table(table, path)


PARQUET_FILES: dict[str, Callable[[Path], object]] = {
    "empty file": _bytes(b""),
    "magic only": _bytes(b"PAR1" * 3),
    "encrypted": _bytes(b"PARE\0\0\0\0PARE"),
    "cut": _damaged(_clear_half),
    "flipped bytes in the first pages": _damaged(_flip(40, 200)),
    "flipped bytes in the middle": _damaged(_flip(15_000, 15_400)),
    "flipped bytes in the footer": _damaged(_flip(-300, -100)),
    "footer of 2 GB": _damaged(_long_footer),
    "no rows": _written({"image": pyarrow.array([], pyarrow.string())}),
    "columns of one name": _same_names,
    "no column image": _written({"t": pyarrow.array(["x"])}),
}
