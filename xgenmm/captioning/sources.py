"""List the records of INPUT: a folder of images and videos, a table, or WebDataset tars.

Listing opens no image or video; `media.MediaReader` does that later, for one record at a time.

`videos` are the suffixes of the files that are videos to the model: see `media.video_suffixes`.
"""

import logging
import os
from collections.abc import Iterator, Sequence, Set
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from xgenmm.captioning.media import IMAGE_SUFFIXES, media_suffix
from xgenmm.captioning.records import Record, UniqueIds, escape_surrogates
from xgenmm.captioning.tables import TABLE_READERS, read_table
from xgenmm.captioning.templates import Columns, add_questions, template_columns
from xgenmm.captioning.untrusted import shorten
from xgenmm.captioning.webdataset import read_tars
from xgenmm.config import VIDEO_128
from xgenmm.errors import InputError

logger = logging.getLogger(__name__)


def count_records(
    source: str, templates: Sequence[str], column: str, videos: Set[str] = frozenset()
) -> int:
    """Return the number of records in INPUT.

    Raises InputError if INPUT cannot be listed or is empty, if none of its records has a column
    that `templates` or `column` name, or if it has videos and PyAV is not installed.
    """
    count, names, first = 0, set[str](), None
    can_decode = find_spec("av") is not None
    for record, columns in _list(source, column, _used(templates), videos):
        first = first or record
        if not can_decode and media_suffix(record.image) in videos:
            problem = f"{source} has videos, such as {shorten(record.image)}; reading them needs"
            raise InputError("INPUT", f"{problem} PyAV; run `pip install av`")
        count += 1
        names |= columns.keys()
    if first is None:
        missing = "images or videos" if videos else f"images; for videos, use {VIDEO_128}"
        raise InputError("INPUT", f"{source} contains no {missing}")
    if not names:
        problem = str(first.error).removeprefix("INPUT: ")
        raise InputError("INPUT", f"no row of {source} can be read; the first error is: {problem}")
    required = [("image-column", column)]
    required += [("template", name) for name in sorted(_used(templates))]
    for option, name in required:
        if name not in names:
            existing = shorten(", ".join(sorted(names)))
            raise InputError(option, f"{source} has no column {name!r}; it has {existing}")
    return count


def read_records(
    source: str, templates: Sequence[str], column: str, videos: Set[str] = frozenset()
) -> Iterator[Record]:
    """Yield the records of INPUT, in the same order every time, each with all `templates` filled.

    Args:
        source: a folder of images, videos or tars, a table, a tar, or a pattern (`*.tar`) of tars.
        templates: questions with column names in braces. A folder has only the image column; tars
            also have `key`, `txt`, and the fields of a sample's .json.
        column: name of the image column. In a table it holds URLs, or paths relative to the table's
            folder; in a folder or tar, the path of the image or video within it.
    """
    for record, columns in _list(source, column, _used(templates), videos):
        yield add_questions(record, columns, templates)


def _used(templates: Sequence[str]) -> frozenset[str]:
    """The columns that templates name."""
    return frozenset(name for template in templates for name in template_columns(template))


def _list(
    source: str, column: str, used: frozenset[str], videos: Set[str]
) -> Iterator[tuple[Record, Columns]]:
    path = Path(source).absolute()  # Ray's workers have another working directory
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if tars:
            return read_tars(path, tars, column, videos)
        return _read_folder(path, column, IMAGE_SUFFIXES | videos)
    if path.suffix == ".tar":
        root, tars = _match_tars(path)
        if tars:
            return read_tars(root, tars, column, videos)
    if not path.is_file():
        raise InputError("INPUT", f"{source} does not exist; give a folder, a table or .tar files")
    if path.suffix not in TABLE_READERS:
        suffixes = ", ".join(TABLE_READERS)
        raise InputError("INPUT", f"{source} is not a table ({suffixes}), a .tar file or a folder")
    return read_table(path, column, used)


def _match_tars(pattern: Path) -> tuple[Path, list[Path]]:
    """Return the folder above the first wildcard of a pattern, and the files that match it."""
    if pattern.exists():
        return pattern.parent, [pattern]
    root = Path(*takewhile(lambda part: not set("*?[") & set(part), pattern.parent.parts))
    return root, sorted(root.glob(str(pattern.relative_to(root))))


def _find_files(folder: Path, suffixes: Set[str]) -> list[Path]:
    """Return the files below a folder with these suffixes, sorted.

    Links to folders are not followed.
    """
    folders, files = [folder], list[Path]()
    while folders:  # not recursive: folders may be nested more deeply than Python's calls
        current = folders.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    path = current / entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif path.suffix.lower() in suffixes and path.is_file():
                        files.append(path)
        except OSError as error:
            logger.warning("skipping a folder that cannot be listed: %s", shorten(str(error)))
    return sorted(files)


def _read_folder(folder: Path, column: str, suffixes: Set[str]) -> Iterator[tuple[Record, Columns]]:
    ids = UniqueIds()
    for path in _find_files(folder, suffixes):
        name = path.relative_to(folder).as_posix()
        image = escape_surrogates(name)
        error = None if image == name else "image: the file name is not valid UTF-8; rename it"
        record = Record(ids.add(image), image, "" if error else str(path), error=error)
        yield record, {column: image}
