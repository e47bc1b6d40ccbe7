"""WebDataset tars as INPUT: the files of a sample share a key, e.g. `0.jpg`, `0.txt`, `0.json`."""

import io
import tarfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from xgenmm.captioning.media import IMAGE_SUFFIXES
from xgenmm.captioning.records import Record, UniqueIds, escape_surrogates
from xgenmm.captioning.templates import Columns
from xgenmm.captioning.untrusted import check_regular, parse_json_object, shorten
from xgenmm.files import TarReader, is_plain

MAX_TEXT_BYTES = 2**24


def read_tars(
    root: Path, paths: Sequence[Path], column: str, videos: Set[str] = frozenset()
) -> Iterator[tuple[Record, Columns]]:
    """Yield the record and the columns of each sample in `paths`, which are below `root`.

    The columns are `key`, `txt`, the fields of the sample's .json, and `column` for the image or
    video. A sample with both is a video.

    videos: suffixes of videos.
    """
    for path in paths:
        name = path.relative_to(root).as_posix()
        ids = UniqueIds()
        try:
            check_regular(path)
            with TarReader(io.FileIO(path)) as file:
                for key, members in _samples(file):
                    record, columns = _read_sample(path, file, members, column, videos)
                    id_ = ids.add(escape_surrogates(f"{name}/{key}"))
                    yield replace(record, id=id_), {"key": key, **columns}
        except Exception as error:  # tarfile raises many kinds on damaged headers
            # The rest of this tar is skipped; the tars after it are still read.
            reason = shorten(str(error))
            message = f"INPUT: {path} is damaged or not a tar file ({reason}); the rest is skipped"
            yield Record(ids.add(escape_surrogates(f"{name}/")), "", "", error=message), {}


def _samples(file: TarReader) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Yield the key and the members of each sample: neighbors of one key, no two of one name.

    The members before a damaged header are yielded before its error is raised.
    """
    key, members, extensions = "", list[tarfile.TarInfo](), set[str]()
    try:
        for member in file.members():
            member_key, extension = _split(member.name)
            if members and (member_key != key or extension in extensions):
                yield key, members
                members, extensions = [], set()
            key = member_key
            members.append(member)
            extensions.add(extension)
    except Exception:
        if members:
            yield key, members
        raise
    if members:
        yield key, members


def _split(name: str) -> tuple[str, str]:
    """Split a member's path into key and extension, at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _read_sample(
    path: Path, file: TarReader, members: Sequence[tarfile.TarInfo], column: str, videos: Set[str]
) -> tuple[Record, Columns]:
    """Return the record, still without an id, and the columns of one sample."""
    columns: dict[str, Any] = {}
    image: tarfile.TarInfo | None = None
    video: tarfile.TarInfo | None = None
    for member in members:
        extension = _split(member.name)[1]
        suffix = f".{extension.rpartition('.')[2]}"
        if extension in ("txt", "json"):
            try:
                columns |= _parse_columns(extension, _read_member(file, member))
            except ValueError as error:
                return _invalid(f"INPUT: {_name(member)} is {error}"), {column: ""}
        elif suffix in videos:
            video = video or member
        elif suffix in IMAGE_SUFFIXES:
            image = image or member
    image = video or image
    if image is None:
        wanted = "image or video" if videos else "image"
        return _invalid(f"image: the sample of {_name(members[0])} has no {wanted}"), columns
    columns[column] = image.name
    if not is_plain(image):
        return _invalid(f"image: {_name(image)} is a link, sparse or not a file"), columns
    name = escape_surrogates(image.name)
    return Record("", name, str(path), image.offset_data, image.size), columns


def _invalid(error: str) -> Record:
    return Record("", "", "", error=error)


def _name(member: tarfile.TarInfo) -> str:
    return shorten(escape_surrogates(member.name))


def _parse_columns(extension: str, content: bytes) -> Columns:
    """Return the columns in a sample's .txt or .json. Raises ValueError, see `_read_member`."""
    if extension == "json":
        return parse_json_object(content)
    try:
        return {"txt": content.decode()}
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 ({error})") from error


def _read_member(file: TarReader, member: tarfile.TarInfo) -> bytes:
    """Return a member's content. Raises ValueError; its message continues "NAME is ..."."""
    if not is_plain(member):
        raise ValueError("a link, sparse or not a file")
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"longer than the {MAX_TEXT_BYTES} bytes allowed")
    content = file.read_range(member.offset_data, member.size)
    if len(content) < member.size:
        raise ValueError("cut short")
    return content
