"""Helpers of the captioning tests: write small datasets, run `xgenmm caption`, read its rows."""

import argparse
import csv
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from xgenmm.captioning import program
from xgenmm.captioning.records import Record
from xgenmm.captioning.sources import read_records

COLORS = ("red", "green", "blue", "yellow", "black", "purple", "orange")
NEW_TOKENS = 6


def png(number: int = 0) -> bytes:
    """A small PNG file, different for each number."""
    file = io.BytesIO()
    color = COLORS[number % len(COLORS)]
    Image.new("RGB", (20 + 3 * number % 29, 20 + number), color).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(png(number))
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def records(source: Path | str, *templates: str, column: str = "image") -> list[Record]:
    return list(read_records(str(source), templates, column))


def caption(source: Path | str, output: Path, checkpoint: Path, *options: str) -> int:
    """Run `xgenmm caption` in this process; return its exit status."""
    parser = argparse.ArgumentParser()
    program.add_arguments(parser)
    arguments = [str(source), "-o", str(output), "--model", str(checkpoint)]
    arguments += ["--max-new-tokens", str(NEW_TOKENS), *options]
    return program.run(parser.parse_args(arguments))


def read_rows(output: Path) -> list[dict[str, Any]]:
    """All rows of OUTPUT, sorted by record id."""
    rows: list[dict[str, Any]] = []
    for path in sorted(output.glob("part-*")):
        if path.suffix == ".parquet":
            rows += pyarrow.parquet.read_table(path).to_pylist()
        else:
            rows += map(json.loads, path.read_text().splitlines())
    return sorted(rows, key=lambda row: row["id"])


def sorted_json(rows: list[dict[str, Any]]) -> list[str]:
    """Rows in an order that does not depend on when they were written."""
    return sorted(json.dumps(row) for row in rows)
