"""Hostile OUTPUT: shards and settings that are cut, empty, foreign or not files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from scripts.hostile.files import DEEP_JSON, write_images
from scripts.hostile.runner import Arguments, Case

Damage = Callable[[Path], object]


def output_cases(outputs: dict[str, Path], images: Path) -> Iterator[Case]:
    """Yield cases that continue a damaged copy of an OUTPUT.

    outputs: an OUTPUT with the rows of `images`, by format.
    """

    def case(group: str, format_: str, name: str, damage: Damage, *names: str) -> Case:
        def build(folder: Path) -> Arguments:
            output = folder / "out"
            shutil.copytree(outputs[format_], output)
            damage(output)
            return [str(images), "--format", format_]

        return Case(group, f"{format_}: {name}", build, names=names)

    for format_, damages in (("jsonl", JSONL_DAMAGES), ("parquet", PARQUET_DAMAGES)):
        shard = f"part-00000.{format_}"
        for name, damage in (FILE_DAMAGES | damages).items():
            yield case("shards of OUTPUT", format_, name, on_file(shard, damage), shard)
        for name in (f"part-x.{format_}", f"part-.{format_}", f"part--1.{format_}"):
            yield case("shards of OUTPUT", format_, name, copied_to(name), name)
        copy = f"part-00001.{format_}"
        yield case("shards of OUTPUT", format_, "a shard twice", copied_to(copy), copy)
    settings = "_settings.json"
    for name, damage in (FILE_DAMAGES | SETTINGS_DAMAGES).items():
        yield case("settings of OUTPUT", "jsonl", name, on_file(settings, damage), settings)
    changes: dict[str, dict[str, object]] = {
        "no questions": {"questions": None},
        "a huge model": {"model": "x" * 10**6},
        "a deep model": {"model": json.loads("[" * 500 + "]" * 500)},
        "many questions": {"questions": ["What?"] * 10**5},
    }
    for name, change in changes.items():
        damage = on_file(settings, changed_json(change))
        yield case("settings of OUTPUT", "jsonl", name, damage, "was made with")


def hive_case() -> Case:
    """OUTPUT below a folder that pyarrow's dataset reader would take for a partition."""

    def build(folder: Path) -> Arguments:
        write_images(folder / "images", 2)
        target = folder / "id=3" / "out"
        target.mkdir(parents=True)
        (folder / "out").symlink_to(target)
        return [str(folder / "images")]

    return Case("shards of OUTPUT", "parquet: below a folder id=3", build, rows=2, errors=0)


def on_file(name: str, damage: Damage) -> Damage:
    return lambda output: damage(output / name)


def copied_to(name: str) -> Damage:
    def copy(output: Path) -> None:
        shard = next(output.glob("part-*"))
        shutil.copy(shard, output / name)

    return copy


def replaced(content: bytes) -> Damage:
    def replace(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return replace


def changed_json(change: dict[str, object]) -> Damage:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | change))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 3, len(content) // 3 + 40):
        content[at] ^= 0xFF
    path.write_bytes(content)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked(target: str) -> Damage:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


def sparse(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(200 << 30)


def first_row(**change: object) -> Damage:
    def damage(path: Path) -> None:
        lines = path.read_text().splitlines()
        row = json.loads(lines[0]) | change
        row = {name: value for name, value in row.items() if value != "absent"}
        path.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")

    return damage


def line_added(line: bytes) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes() + line + b"\n")


def table(**columns: list[object]) -> Damage:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


FILE_DAMAGES: dict[str, Damage] = {
    "cut": cut,
    "empty": replaced(b""),
    "bytes": replaced(bytes(range(256)) * 20),
    "text": replaced(b"Hello.\n"),
    "directory": directory,
    "FIFO": fifo,
    "link to nothing": linked("nowhere"),
    "link to itself": linked("part-00000.jsonl"),
    "link to /dev/zero": linked("/dev/zero"),
    "sparse 200 GB": sparse,
}
JSONL_DAMAGES: dict[str, Damage] = {
    "one line cut": line_added(b'{"id": "9", "im'),
    "a line is a list": line_added(b"[]"),
    "a line is empty": line_added(b""),
    "no id": first_row(id="absent"),
    "no image": first_row(image="absent"),
    "id is a number": first_row(id=3),
    "id is a list": first_row(id=["0"]),
    "image is null": first_row(image=None),
    "JSON 200,000 deep": line_added(DEEP_JSON),
    "integer of 5,000 digits": line_added(b'{"id": ' + b"1" * 5000 + b"}"),
    "invalid UTF-8": line_added(b'{"id": "\xff", "image": "a"}'),
    "line of 64 MB": line_added(b'{"id": "' + b"a" * (64 << 20) + b'"'),
}
PARQUET_DAMAGES: dict[str, Damage] = {
    "flipped bytes": flipped,
    "magic only": replaced(b"PAR1" * 3),
    "encrypted": replaced(b"PARE\0\0\0\0PARE"),
    "other columns": table(a=[1], b=["x"]),
    "no image": table(id=["0.png"]),
    "id is a number": table(id=[1], image=["0.png"]),
    "id is a list": table(id=[["0.png"]], image=["0.png"]),
    "image is null": table(id=["0.png"], image=[None]),
    "image is bytes": table(id=["0.png"], image=[b"0.png"]),
}
SETTINGS_DAMAGES: dict[str, Damage] = {
    "list": replaced(b"[]"),
    "number": replaced(b"3"),
    "invalid UTF-8": replaced(b'{"format": "\xff"}'),
    "JSON 200,000 deep": replaced(DEEP_JSON),
    "integer of 5,000 digits": replaced(b'{"top_k": ' + b"1" * 5000 + b"}"),
    "NUL": replaced(b"\0" * 100),
}
