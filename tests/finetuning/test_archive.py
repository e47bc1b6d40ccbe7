"""Datasets as archives: what is unpacked, and that hostile archives are refused and bounded."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from xgenmm.errors import InputError
from xgenmm.finetuning.archive import MAX_HEADER_BYTES, ArchiveLimits, unpack

LIMITS = ArchiveLimits(files=20, unpacked_bytes=100_000, data_bytes=50_000)
DATA = ("data.jsonl", b"{}")


def make_zip(*files: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return content.getvalue()


def make_tar(*files: tuple[str | tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def tar_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zip_link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, 0o120777 << 16
    return member


def encrypted() -> bytes:
    """A zip whose flags say that its file is encrypted."""
    content = bytearray(make_zip(DATA))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    return bytes(content)


def long_table() -> bytes:
    """A zip that says its table of contents has 32 MB."""
    content = bytearray(make_zip(DATA))
    content[:0] = b"PK\x03\x04" + bytes(32 << 20)
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 32 << 20)
    return bytes(content)


def long_header() -> bytes:
    """A tar whose extended header has too many bytes, compressed to few."""
    return make_tar((tar_member("h", tarfile.XHDTYPE), bytes(MAX_HEADER_BYTES + 1)), mode="w:gz")


def negative_size() -> bytes:
    """A tar whose file has -512 bytes, so that a reader may read it for ever."""
    member = tar_member("a", tarfile.REGTYPE)
    member.size = -512
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    "pack",
    [
        make_zip,
        make_tar,
        lambda *files: make_tar(*files, mode="w:gz"),
    ],
    ids=["zip", "tar", "tar.gz"],
)
def test_archive_becomes_a_folder(pack: Callable[..., bytes], tmp_path: Path) -> None:
    hidden = [("__MACOSX/._data.jsonl", b"?"), (".git/a.json", b"?"), ("set/Thumbs.db", b"?")]
    archive = pack(*hidden, ("./set/images/a b.png", b"image"), ("set/data.jsonl", b"line"))
    assert unpack(archive, tmp_path, LIMITS) == tmp_path / "set" / "data.jsonl"
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"set/images/a b.png", "set/data.jsonl"}
    assert (tmp_path / "set" / "images" / "a b.png").read_bytes() == b"image"


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty; give a .zip"),
    "not an archive": (lambda: b"GIF89a" * 200, "is not a complete archive"),
    "other kind": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(600), "is not a complete archive"),
    "zip cut short": (lambda: make_zip(DATA)[:-5], "is not a complete archive"),
    "zip with a wrong checksum": (
        lambda: make_zip(("data.jsonl", b"a" * 99)).replace(b"\x4b\x4c\xa4", b"\x4b\x4c\xa5", 1),
        "is not a complete archive",
    ),
    "tar cut short": (lambda: make_tar(("data.jsonl", bytes(5000)))[:2000], "is not a complete"),
    "tar.gz cut short": (lambda: make_tar(DATA, mode="w:gz")[:-30], "is not a complete archive"),
    "long table of contents": (long_table, "table of contents has 33,554,432 bytes"),
    "long header": (long_header, f"a header has {MAX_HEADER_BYTES + 1:,} bytes"),
    "negative size": (negative_size, "a header has -512 bytes"),
    "no files": (make_zip, "has no data file"),
    "no data file": (lambda: make_zip(("a.png", b"")), r"has no data file .*only a\.png"),
    "nested": (lambda: make_zip(("in.zip", make_zip(DATA))), r"no data file .*only in\.zip"),
    "two data files": (lambda: make_zip(DATA, ("b.json", b"")), r"b\.json, data\.jsonl; pack"),
    "folder as data file": (lambda: make_zip(("data.json/a", b"")), "data.json is a folder"),
    "long data file": (lambda: make_zip(("a.json", bytes(50_001))), "has 50,001 bytes, more"),
    "encrypted": (encrypted, "'data.jsonl' is encrypted; pack without"),
    "zip bomb": (lambda: make_zip(DATA, ("a", bytes(100_001))), "more than 100,000 bytes when"),
    "tar bomb": (lambda: make_tar(("a", bytes(100_001)), mode="w:gz"), "more than 100,000 bytes"),
    "many files": (lambda: make_zip(*((f"{n}", b"") for n in range(21))), "more than 20 files"),
    "many folders": (
        lambda: make_tar(*((tar_member(f"{n}", tarfile.DIRTYPE), b"") for n in range(21))),
        "more than 20 files",
    ),
    "deep": (lambda: make_zip(("a/" * 40 + "data.json", b"")), "more than 32 folders deep"),
    "long name": (lambda: make_zip(("a" * 300 + ".json", b"")), "cannot be unpacked .File name"),
    "file twice": (lambda: make_tar(DATA, DATA), "has 'data.jsonl' twice"),
    "file and folder": (lambda: make_zip(("a", b""), ("a/b", b"")), "has 'a/b' twice"),
    "zip link": (lambda: make_zip((zip_link("a"), b"/etc")), "'a' is a link; pack files"),
    "tar link": (lambda: make_tar((tar_member("a", tarfile.SYMTYPE, "/etc"), b"")), "is a link"),
    "hard link": (lambda: make_tar((tar_member("a", tarfile.LNKTYPE, "/etc"), b"")), "is a link"),
    "device": (lambda: make_tar((tar_member("a", tarfile.CHRTYPE), b"")), "'a' is a device"),
    "FIFO": (lambda: make_tar((tar_member("a", tarfile.FIFOTYPE), b"")), "'a' is a device"),
    **{
        f"{pack.__name__} {path}": (
            lambda path=path, pack=pack: pack((path, b"")),  # type: ignore[misc]
            "leads out of the archive",
        )
        for pack in (make_zip, make_tar)
        for path in ("../a.json", "/tmp/a.json", "a/../../b.json", "..\\a.json", "C:\\a.json")
    },
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archive_is_refused(kind: str, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    folder = tmp_path / "below" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=f"^dataset: .*{message}"):
        unpack(make(), folder, LIMITS)
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)}
    assert outside == {folder.parent}


def test_stream_that_never_ends_is_refused(tmp_path: Path) -> None:
    zeros = make_tar(("data.jsonl", b"{}"))[:1024] + bytes(50_000_000)
    assert unpack(gzip.compress(zeros), tmp_path, LIMITS) == tmp_path / "data.jsonl"
