"""A dataset that a stranger sends as one file: a zip or tar archive -> a folder, bounded.

Only regular files and folders are written, below the given folder and nowhere else. Anything that
is more than that (links, devices, paths that lead out, encrypted files) refuses the whole archive.
Archives within archives are files like any other.
"""

import io
import stat
import sys
import tarfile
import zipfile
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from xgenmm.errors import InputError, listed, printable
from xgenmm.finetuning.dataset import SUFFIXES

KINDS = "a .zip, .tar or .tar.gz file"
MAX_DEPTH = 32  # of folders; `shutil.rmtree` is recursive
MAX_DIRECTORY_BYTES = 16 << 20  # of a zip file's table, which becomes many times that in memory
MAX_HEADER_BYTES = 1 << 20  # of a tar file's extended headers, which are read whole
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_SYSTEM_FILES = ("__MACOSX", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class ArchiveLimits:
    """What one archive may become.

    Attributes:
        files: their number, folders among them.
        unpacked_bytes: of all files together.
        data_bytes: of the data file, which is read whole.
    """

    files: int = 100_000
    unpacked_bytes: int = 20_000_000_000
    data_bytes: int = 1_000_000_000


@dataclass(frozen=True)
class _Entry:
    """One entry of an archive.

    Attributes:
        path: as the archive has it.
        size: in bytes, as declared.
        problem: why it cannot be taken; empty if it can.
        content: None for a folder.
    """

    path: str
    size: int
    problem: str = ""
    content: IO[bytes] | None = None


Entries = Generator[_Entry, None, None]


def unpack(
    content: bytes, folder: Path, limits: ArchiveLimits | None = None, name: str = "dataset"
) -> Path:
    """Write the files of an archive into an existing, empty folder; return the data file.

    Hidden files and those that macOS and Windows add are left out.

    name: the input's name in error messages.

    Raises InputError if the archive is damaged, exceeds a limit, has anything but files and
    folders, or has not exactly one data file (.jsonl or .json). The folder then has a part of it.
    """
    limits = limits or ArchiveLimits()
    if not content:
        raise InputError(name, f"the file is empty; give {KINDS}")
    try:
        with closing(_entries(content)) as entries:
            _write(entries, folder, limits, name)
    except InputError:
        raise
    except OSError as error:
        if error.errno is None:  # Python's own readers raise these about the content
            raise _damaged(name, error) from error
        problem = f"cannot be unpacked ({error.strerror}: {printable(error.filename or '')})"
        raise InputError(name, problem) from error
    except Exception as error:  # a hostile archive makes libraries raise many kinds
        raise _damaged(name, error) from error
    return _data_file(folder, limits, name)


def _damaged(name: str, error: Exception) -> InputError:
    reason = printable(str(error) or type(error).__name__)
    return InputError(name, f"is not a complete archive ({reason}); give {KINDS}")


def _write(entries: Entries, folder: Path, limits: ArchiveLimits, name: str) -> None:
    count, room = 0, limits.unpacked_bytes
    for entry in entries:
        count += 1
        if count > limits.files:
            raise InputError(name, f"has more than {limits.files:,} files; pack fewer")
        problem = entry.problem or _path_problem(entry.path)
        if problem:
            raise InputError(name, f"{printable(entry.path)!r} {problem}")
        if entry.size < 0:
            raise ValueError(f"{printable(entry.path)} has {entry.size:,} bytes")
        room -= entry.size
        if room < 0:
            most = f"{limits.unpacked_bytes:,}"
            raise InputError(name, f"has more than {most} bytes when unpacked; pack less")
        path = PurePosixPath(entry.path)
        if any(part.startswith(".") or part in _SYSTEM_FILES for part in path.parts):
            continue
        if entry.content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            _write_file(folder / path, entry, name)


def _write_file(path: Path, entry: _Entry, name: str) -> None:
    assert entry.content is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        shown = printable(entry.path)
        raise InputError(name, f"has {shown!r} twice; give each file a path of its own") from error
    written = 0
    with file, entry.content:
        while chunk := entry.content.read(_CHUNK):
            written += len(chunk)
            if written > entry.size:
                raise ValueError(f"{printable(entry.path)} is longer than declared")
            file.write(chunk)


def _path_problem(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text:
        return "leads out of the archive; pack files with paths relative to one folder"
    if len(path.parts) > MAX_DEPTH:
        return f"lies more than {MAX_DEPTH} folders deep; pack fewer folders"
    return ""


def _entries(content: bytes) -> Entries:
    """Yield the entries of an archive; the content of each is valid until the next."""
    if content.startswith(_ZIP):
        yield from _zip_entries(content)
        return
    mode = "r|gz" if content.startswith(_GZIP) else "r|"
    # As a stream: nothing is read twice, nor before it is asked for.
    with tarfile.open(fileobj=io.BytesIO(content), mode=mode, tarinfo=_TarInfo) as archive:  # type: ignore[call-overload]
        for member in archive:
            archive.members.clear()  # it would keep all
            if member.isdir():
                yield _Entry(member.name, 0)
            elif member.isreg():
                yield _Entry(member.name, member.size, "", archive.extractfile(member))
            else:
                kind = "a link" if member.islnk() or member.issym() else "a device"
                yield _Entry(member.name, 0, f"is {kind}; pack files and folders only")


def _zip_entries(content: bytes) -> Entries:
    with zipfile.ZipFile(_ZipContent(content)) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                what = "a link" if kind == stat.S_IFLNK else "a device"
                yield _Entry(member.filename, 0, f"is {what}; pack files and folders only")
            elif member.is_dir():
                yield _Entry(member.filename, 0)
            elif member.flag_bits & 1:
                yield _Entry(member.filename, 0, "is encrypted; pack without a password")
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                problem = "is compressed in an unusual way; pack it with the method deflate"
                yield _Entry(member.filename, 0, problem)
            else:
                yield _Entry(member.filename, member.file_size, "", archive.open(member))


class _ZipContent(io.BytesIO):
    """A zip file whose table of contents is bounded: `zipfile` reads it at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ValueError if this is the table and it is too long."""
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise ValueError(f"its table of contents has {size:,} bytes")
        return super().read(size)


class _TarInfo(tarfile.TarInfo):
    """A header of a tar file; those that hold only a long name or attributes are bounded."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Process a header; CPython's source names this the method to override."""
        of_contents = (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE)
        most = MAX_HEADER_BYTES if self.type not in of_contents else sys.maxsize
        if not 0 <= self.size <= most:
            raise ValueError(f"a header has {self.size:,} bytes")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member


def _data_file(folder: Path, limits: ArchiveLimits, name: str) -> Path:
    found = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    shown = [str(path.relative_to(folder)) for path in found]
    if not found:
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        content = listed(files) if files else "no files"
        kinds = " or ".join(SUFFIXES)
        raise InputError(
            name, f"has no data file ({kinds}), only {content}; pack it with the images"
        )
    if len(found) > 1:
        raise InputError(name, f"has several data files, {listed(shown)}; pack them as one")
    if not found[0].is_file():
        raise InputError(name, f"{printable(shown[0])} is a folder; it must be the data file")
    size = found[0].stat().st_size
    if size > limits.data_bytes:
        problem = f"{printable(shown[0])} has {size:,} bytes, more than {limits.data_bytes:,}"
        raise InputError(name, f"{problem}; put images into files of their own")
    return found[0]
