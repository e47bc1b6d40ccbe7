"""Small files that the hostile datasets consist of."""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

TERABYTE = 1 << 40
DEEP_JSON = b"[" * 200_000 + b"]" * 200_000
COLORS = ("red", "green", "blue", "yellow", "black")


def png(number: int = 0) -> bytes:
    """A small PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (20, 20), COLORS[number % len(COLORS)]).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, count: int) -> Path:
    """Write `count` images into a new folder."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def tar_header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A tar header of 512 bytes that states any size, also a negative or a huge one."""
    info = tarfile.TarInfo(name)
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-512:])
    if 0 <= size < 8**11:
        header[124:136] = b"%011o\0" % size
    else:
        header[124:136] = bytes([0x80 if size > 0 else 0xFF]) + size.to_bytes(11, signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_member(name: str, content: bytes, kind: bytes = b"0") -> bytes:
    """A member of a tar: header, content and padding."""
    return tar_header(name, len(content), kind) + content + bytes(-len(content) % 512)


def pax_header(records: bytes) -> bytes:
    """A pax extended header with these raw records, for the member after it."""
    return tar_member("pax", records, b"x")


def pax_record(key: str, value: str) -> bytes:
    """A well-formed pax record: its length, key and value."""
    text = f" {key}={value}\n".encode()
    length = len(text) + 1
    while len(str(length)) + len(text) != length:
        length += 1
    return str(length).encode() + text


def write_tar(path: Path, members: Iterable[bytes]) -> Path:
    """Write a tar of these members, with the two empty blocks that end it."""
    path.write_bytes(b"".join(members) + bytes(1024))
    return path


def sparse_file(path: Path, size: int, content: bytes = b"") -> Path:
    """A file that begins with `content` and has holes up to `size`."""
    path.write_bytes(content)
    os.truncate(path, size)
    return path
