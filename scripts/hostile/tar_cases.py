"""Hostile tars and folders as INPUT. Each has a good image beside what is wrong."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.hostile.files import (
    DEEP_JSON,
    TERABYTE,
    pax_header,
    pax_record,
    png,
    sparse_file,
    tar_header,
    tar_member,
)
from scripts.hostile.runner import Arguments, Case

FIRST, LAST = tar_member("first.png", png(0)), tar_member("last.png", png(1))


def tar_cases() -> Iterator[Case]:
    """Yield the cases of tars: between two good samples, and whole files."""
    for name, members, rows, errors in TARS:
        yield _case(name, FIRST + members + LAST + bytes(1024), rows, errors)
    good = FIRST + LAST + bytes(1024)
    yield _case("cut in a header", good[: len(FIRST) + 100], 2, 1)
    yield _case("cut in an image", good[: len(FIRST) + 512 + 20], 3, 2)
    yield _case("cut in the padding", good[: len(FIRST) + 512 + len(png(1)) + 20], 3, 1)
    yield _case("no end blocks", FIRST + LAST, 2, 0)
    yield _case("second header damaged", FIRST + b"x" * 512 + LAST, 2, 1)
    yield _case("checksum wrong", FIRST + LAST.replace(b"last", b"fast"), 2, 1)
    for name, content in {
        "empty file": b"",
        "empty blocks": bytes(10240),
        "gzip": gzip.compress(good),
        "text": b"hello\n" * 1000,
        "PNG": png(),
    }.items():
        yield _case(name, content, None, None, ("t.tar",))


def folder_cases() -> Iterator[Case]:
    """Yield the cases of folders."""
    for name, (write, rows, errors) in FOLDERS.items():
        yield Case("folders", name, _folder(write), rows, errors)


def _case(
    name: str, content: bytes, rows: int | None, errors: int | None, names: tuple[str, ...] = ()
) -> Case:
    def build(folder: Path) -> Arguments:
        (folder / "t.tar").write_bytes(content)
        return [str(folder / "t.tar")]

    return Case("tars", name, build, rows, errors, names)


def _sparse(name: str, size: int) -> bytes:
    """A member in GNU's old sparse format: 512 bytes at its start, then a hole."""
    header = bytearray(tar_header(name, 512, b"S"))
    header[386:398], header[398:410] = b"00000000000\0", b"00000001000\0"
    header[483:495] = b"\x80" + size.to_bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + png().ljust(512, b"\0")


def _pax_sparse(name: str, size: int, sparse_map: bytes) -> bytes:
    """A member in pax sparse format 1.0, whose map is the beginning of its data."""
    records = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")]
    records += [("GNU.sparse.name", name), ("GNU.sparse.realsize", str(size))]
    head = pax_header(b"".join(pax_record(key, value) for key, value in records))
    return head + tar_member(name, sparse_map.ljust(512, b"\0") + png())


def _link(name: str, target: str, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info.tobuf(tarfile.GNU_FORMAT)


def _sample(extension: str, content: bytes) -> bytes:
    return tar_member("bad.png", png()) + tar_member(f"bad.{extension}", content)


MANY_MEMBERS = b"".join(tar_member(f"bad.{number}.txt", b"") for number in range(10_000))
TARS: list[tuple[str, bytes, int, int | None]] = [
    # what is between the good samples, expected rows, expected errors
    ("image of 1 TB", tar_header("bad.png", TERABYTE) + png(), 3, 2),
    ("JSON of 1 TB", tar_member("bad.png", png()) + tar_header("bad.json", TERABYTE), 3, 2),
    ("text of 1 TB", tar_member("bad.png", png()) + tar_header("bad.txt", TERABYTE), 3, 2),
    ("JSON of 40 MB", _sample("json", b'{"a": "' + b"a" * (40 << 20) + b'"}'), 3, 1),
    ("text of 40 MB", _sample("txt", b"a" * (40 << 20)), 3, 1),
    ("image of -512 bytes", tar_header("bad.png", -512), 2, 1),
    ("image of -1024 bytes", tar_header("bad.png", -1024) + bytes(512), 2, 1),
    ("pax header of -512 bytes", tar_header("pax", -512, b"x"), 2, 1),
    ("pax header of 1 TB", tar_header("pax", TERABYTE, b"x"), 2, 1),
    ("long name of 1 TB", tar_header("././@LongLink", TERABYTE, b"L"), 2, 1),
    ("long name of -1 bytes", tar_header("././@LongLink", -1, b"L"), 2, 1),
    ("sparse image of 1 TB", _sparse("bad.png", TERABYTE), 3, 1),
    ("sparse JSON of 1 TB", tar_member("bad.png", png()) + _sparse("bad.json", TERABYTE), 3, 1),
    ("sparse small image", _sparse("bad.png", 1024), 3, 1),
    ("pax sparse 1 TB", _pax_sparse("bad.png", TERABYTE, b"1\n0\n100\n"), 3, 1),
    ("pax sparse map cut", _pax_sparse("bad.png", 1024, b"1000\n0\n"), 2, 1),
    ("pax sparse map of text", _pax_sparse("bad.png", 1024, b"x\ny\n"), 2, 1),
    ("pax size is text", pax_header(pax_record("size", "x")) + tar_member("bad.png", b""), 3, 1),
    ("pax size is -512", pax_header(pax_record("size", "-512")) + tar_header("bad.png", 0), 2, 1),
    ("pax record without length", pax_header(b"path=a.png\n"), 2, None),
    ("pax record of length 0", pax_header(b"0 path=a.png\n"), 2, None),
    ("pax record of length 10**30", pax_header(b"1" + b"0" * 30 + b" path=a\n"), 2, None),
    ("pax record of 6,000 digits", pax_header(b"1" * 6000 + b" path=a\n"), 2, None),
    ("pax record of 300 kB of digits", pax_header(b"1" * 300_000), 2, None),
    ("absolute name", tar_member("/bad.png", png()), 3, 0),
    ("absolute and relative name", tar_member("/x.png", png()) + tar_member("x.png", png()), 4, 0),
    ("absolute name in the way", tar_member("/first.png", png()) + FIRST, 4, 0),
    ("name of another folder", tar_member("../bad.png", png()), 3, 0),
    ("keys a, a#2, a", b"".join(tar_member(f"{k}.png", png()) for k in ("a", "a#2", "a")), 5, 0),
    ("keys a, b, a, b, a", b"".join(tar_member(f"{k}.png", png()) for k in "ababa"), 7, 0),
    ("a name twice", tar_member("a.png", png()) * 2, 4, 0),
    ("a name three times", tar_member("a.png", png()) * 3, 5, 0),
    ("no key", tar_member(".png", png()), 3, 0),
    ("no key, then damaged", tar_member(".png", png()) + b"x" * 512, 3, 1),
    ("empty name", tar_member("", png()), 3, 1),
    ("name is not UTF-8", tar_member("\udcff.png", png()), 3, 0),
    (
        "two names that escape alike",
        tar_member("\udcff.png", png()) + tar_member("\\udcff.png", png()),
        4,
        0,
    ),
    ("name with a line feed", tar_member("a\nb.png", png()), 3, 0),
    ("hard link", _link("bad.png", "first.png", tarfile.LNKTYPE), 3, None),
    ("symbolic link", _link("bad.png", "/etc/passwd", tarfile.SYMTYPE), 3, 1),
    ("link to itself", _link("bad.png", "bad.png", tarfile.LNKTYPE), 3, 1),
    ("FIFO", _link("bad.png", "", tarfile.FIFOTYPE), 3, 1),
    ("device", _link("bad.png", "", tarfile.CHRTYPE), 3, 1),
    ("unknown type", tar_member("bad.png", png(), b"Q"), 3, None),
    ("empty image", tar_member("bad.png", b""), 3, 1),
    ("JSON 200,000 deep", _sample("json", DEEP_JSON), 3, 1),
    ("JSON of 5,000 digits", _sample("json", b'{"a": ' + b"1" * 5000 + b"}"), 3, 1),
    ("JSON is a list", _sample("json", b"[]"), 3, 1),
    ("JSON is empty", _sample("json", b""), 3, 1),
    ("JSON has a key `image`", _sample("json", b'{"image": 3, "key": 4}'), 3, 0),
    ("text is not UTF-8", _sample("txt", b"\xff\xfe"), 3, 1),
    ("10,000 members of a key", MANY_MEMBERS, 3, 1),
]


def _folder(write: Callable[[Path], object]) -> Callable[[Path], Arguments]:
    def build(folder: Path) -> Arguments:
        images = folder / "images"
        images.mkdir()
        (images / "good.png").write_bytes(png())
        write(images)
        return [str(images)]

    return build


def _deep_folder(images: Path) -> None:
    depth = 0
    handle = os.open(images, os.O_RDONLY)
    while depth < 1100:
        os.mkdir("d", dir_fd=handle)
        below = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle, depth = below, depth + 1
    os.close(handle)


def _file(name: bytes, content: bytes) -> Callable[[Path], object]:
    return lambda images: Path(os.fsdecode(os.fsencode(images / "x")[:-1] + name)).write_bytes(
        content
    )


def _alike(images: Path) -> None:
    _file(b"\xff.png", png())(images)
    _file(b"\\udcff.png", png())(images)


def _big_tiff() -> bytes:
    file = io.BytesIO()
    file.write(b"II*\0" + (2**32 - 8).to_bytes(4, "little"))
    return file.getvalue()


FOLDERS: dict[str, tuple[Callable[[Path], object], int, int]] = {
    "name is not UTF-8": (_file(b"\xff.png", png()), 2, 1),
    "two names that escape alike": (_alike, 3, 1),
    "name with a line feed": (_file(b"a\nb.png", png()), 2, 0),
    "FIFO": (lambda images: os.mkfifo(images / "fifo.png"), 1, 0),
    "link to /dev/zero": (lambda images: (images / "zero.png").symlink_to("/dev/zero"), 1, 0),
    "link to itself": (lambda images: (images / "loop.png").symlink_to("loop.png"), 1, 0),
    "link to the folder": (lambda images: (images / "up").symlink_to("."), 1, 0),
    "folder x.png": (lambda images: (images / "x.png").mkdir(), 1, 0),
    "1,100 folders deep": (_deep_folder, 1, 0),
    "empty file": (_file(b"x.png", b""), 2, 1),
    "text": (_file(b"x.png", b"hello"), 2, 1),
    "TIFF whose directory is at 4 GB": (_file(b"x.tif", _big_tiff()), 2, 1),
    "sparse 1 TB": (lambda images: sparse_file(images / "x.tif", TERABYTE, b"II*\0"), 2, 1),
}
