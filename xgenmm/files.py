"""Reading files that may not be what they should be, and writing files that are never half-written.

Shared by checkpoints, adapters, the tokenizer and datasets.
"""

import fcntl
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import pydantic

from xgenmm.errors import explain

T = TypeVar("T")

MAX_BYTES = 16 << 20  # of a file that is read whole; the released tokenizer.json has 1.8 MB

MAX_TAR_HEADER_BYTES = 2**16

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: Path, max_bytes: int | None = None) -> io.BufferedReader:
    """Open a file that came with a checkpoint or dataset, for reading.

    Raises OSError if it cannot be opened (FileNotFoundError if it does not exist), and ValueError,
    naming it, if it is not a regular file, is a link out of its folder, is a Git LFS pointer, or
    has more than `max_bytes` bytes. Links into a cache of the Hugging Face hub are followed.
    """
    if path.is_symlink():
        _check_link(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a file")
        raise ValueError(f"{path} is {kind}, but must be a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"{path} has {status.st_size:,} bytes, more than {max_bytes:,}")
    file = path.open("rb")
    if file.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
        file.close()
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`, or download it"
        )
    return file


def _check_link(path: Path) -> None:
    try:
        target = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise ValueError(f"{path} is a broken link ({error.strerror})") from error
    in_folder = target.is_relative_to(os.path.realpath(path.parent))
    in_hub_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith(
        "models--"
    )
    if not (in_folder or in_hub_cache):
        raise ValueError(
            f"{path} is a link out of its folder, to {target}; copy the file, or link the folder "
            "as a whole"
        )


def read_file(path: Path) -> bytes:
    """Return the content of a small file; raises as `open_file` does, with MAX_BYTES."""
    with open_file(path, MAX_BYTES) as file:
        return file.read(MAX_BYTES)


def read_json(path: Path, kind: type[T]) -> T:
    """Return the JSON in a file as a pydantic model or another type that pydantic validates.

    Raises as `read_file` does, and ValueError that names the file, the field and what would be
    right.
    """
    content = read_file(path)
    try:
        return pydantic.TypeAdapter(kind).validate_json(content, strict=True)
    except pydantic.ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            reason = error.errors()[0]["msg"].removeprefix("Invalid JSON: ")
            raise ValueError(f"{path} is not valid JSON ({reason})") from error
        raise ValueError(f"{path}: {explain(error)}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises as `read_json` does."""
    return read_json(path, dict[str, Any])


class TarReader(io.BufferedReader):
    """An uncompressed tar, which may be damaged or hostile; made from a `FileIO`.

    It refuses the huge and negative reads that a hostile header makes `tarfile` ask for. Nothing is
    extracted; the content of a plain member is a range of bytes.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """Read a header, for `tarfile`."""
        if size is None or not 0 <= size <= MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)

    def read_range(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on; fewer at the end of the file."""
        self.seek(offset)
        return super().read(size)

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Yield all members but folders. Raises many kinds of errors for damaged headers."""
        with tarfile.open(fileobj=self, mode="r:", errors="surrogateescape") as tar:
            for member in tar:
                if member.size < 0:  # tarfile would read it again for ever
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                if not member.isdir():
                    yield member
            # tarfile takes a damaged header for the end, unless it is the first.
            if self.read_range(tar.offset, tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether the content of a tar's member is a range of its bytes: no link, no sparse file."""
    return member.isreg() and not member.issparse()


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, atomically (see `atomic_write`)."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    After a crash at any moment `path` holds the old content or the new one, never a part of either.
    The temporary file is `_NAME.partial` beside it, which readers of Parquet folders ignore.
    """
    partial = path.with_name(f"_{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)  # so that the new name survives a power failure too


def sync(path: Path) -> None:
    """Flush a file or folder from the system's page cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on an existing folder until the block or the process ends.

    Raises BlockingIOError if another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
