"""DATA -> samples: a file, a folder of files, or a mix of files with counts.

A file holds one record a line (`.jsonl`) or one list of records (`.json`), see `samples.py`. A mix
is a YAML file `data_path: {FILE: COUNT}` as the authors have it: a file of more samples gives a
random choice of them, one of fewer gives some more than once; null takes all once. Files of a mix
are relative to it.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from xgenmm.errors import InputError, printable
from xgenmm.finetuning.samples import MAX_IMAGES, Sample, parse_sample

SUFFIXES = (".json", ".jsonl")
MIX_SUFFIXES = (".yaml", ".yml")
MIX_KEY = "data_path"


@dataclass(frozen=True)
class Place:
    """Where a sample comes from; `line` counts from 1."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Fault:
    """What is wrong at a place, and what would be right."""

    place: Place
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


@dataclass(frozen=True)
class PlacedSample:
    """A sample without faults of its own, and its place; its paths are relative to the file."""

    sample: Sample
    place: Place


@dataclass
class Dataset:
    """The samples of all files, in their order, and every fault.

    Attributes:
        counts: samples of each file, as often as they are used.
    """

    samples: list[PlacedSample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    counts: dict[Path, int] = field(default_factory=dict)


def read_dataset(path: Path, max_images: int = MAX_IMAGES, seed: int = 42) -> Dataset:
    """Read DATA; images are not opened yet.

    seed: of the choice of records of a mix.

    Raises InputError, naming DATA, if it cannot be read, has no data files, or is not a valid mix.
    """
    dataset, rng = Dataset(), random.Random(seed)
    for file, count in _files(path):
        samples = []
        for place, record, problem in _records(file):
            sample = Sample(faults=[problem]) if problem else parse_sample(record, max_images)
            dataset.faults += [Fault(place, fault) for fault in sample.faults]
            if not sample.faults:
                samples.append(PlacedSample(sample, place))
        if count is not None and samples:
            draw = rng.sample if count < len(samples) else rng.choices
            samples = draw(samples, k=count) if count != len(samples) else samples
        dataset.samples += samples
        dataset.counts[file] = len(samples)
    if not dataset.samples and not dataset.faults:
        raise InputError("DATA", f"{path} has no samples")
    return dataset


def _files(path: Path) -> list[tuple[Path, int | None]]:
    """Return the data files of DATA, and how many samples of each to take; None for all."""
    if path.suffix in MIX_SUFFIXES:
        return _mix(path, _load_yaml(path))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise InputError("DATA", f"{path} has no {' or '.join(SUFFIXES)} file")
        return [(file, None) for file in files]
    if path.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES + MIX_SUFFIXES)
        raise InputError("DATA", f"{path} must be a folder or end in one of {known}")
    if not path.is_file():
        raise InputError("DATA", f"{path} does not exist; give a file of samples")
    return [(path, None)]


def _load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = f"{path} cannot be read as YAML ({printable(error)})"
        raise InputError("DATA", problem) from error


def _mix(path: Path, content: Any) -> list[tuple[Path, int | None]]:
    example = f"a mix such as {MIX_KEY}: {{a.jsonl: 1000, b.json: null}}"
    files = content.get(MIX_KEY) if isinstance(content, Mapping) else None
    if not isinstance(files, Mapping) or not files:
        raise InputError("DATA", f"{path} must be {example}")
    for name, count in files.items():
        is_count = isinstance(count, int) and not isinstance(count, bool) and count > 0
        if not isinstance(name, str) or not (count is None or is_count):
            shown = printable(f"{name}: {count}")
            raise InputError("DATA", f"{path}: {shown} must be a file and a count, as in {example}")
        file = path.parent / name
        if file.suffix not in SUFFIXES or not file.is_file():
            problem = f"{path}: {file} is not a file that ends in {' or '.join(SUFFIXES)}"
            raise InputError("DATA", problem)
    return [(path.parent / name, count) for name, count in files.items()]


def _records(file: Path) -> Iterator[tuple[Place, object, str]]:
    """Yield each record with its place, or what is wrong with the file at that place."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({printable(error)}); give a text file in UTF-8"
        yield Place(file, 1), None, problem
        return
    if file.suffix == ".jsonl":
        yield from _lines(file, text)
    else:
        yield from _list_items(file, text)


def _lines(file: Path, text: str) -> Iterator[tuple[Place, object, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield Place(file, number), json.loads(line), ""
        except (ValueError, RecursionError) as error:
            problem = f"is not valid JSON ({printable(error)}); write one object a line"
            yield Place(file, number), None, problem


def _list_items(file: Path, text: str) -> Iterator[tuple[Place, object, str]]:
    """Decode a list item by item, which tells the line of each."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        problem = "must be a list of objects; a file of one object a line must end in .jsonl"
        yield Place(file, 1), None, problem
        return
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, position = decoder.raw_decode(text, position)
            position = _skip(text, position)
            separator = text[position : position + 1]
            if separator not in (",", "]"):
                raise json.JSONDecodeError("expected , or ]", text, position)
        except (ValueError, RecursionError) as error:
            problem = f"is not valid JSON ({printable(error)}); the rest of the file is not read"
            yield Place(file, line), None, problem
            return
        yield Place(file, line), record, ""
        position = _skip(text, position + 1) if separator == "," else position


def _skip(text: str, position: int) -> int:
    """Return the position of the next character that is not white space."""
    while text[position : position + 1] in ("\n", "\r", "\t", " "):
        position += 1
    return position
