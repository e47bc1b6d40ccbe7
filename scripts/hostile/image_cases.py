"""Hostile images and image inputs of a request."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from scripts.hostile.files import png
from scripts.hostile.requests import Case, Expected, data_url, predict

QUESTION = {"question": "What is this?", "max_new_tokens": 2}
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    length = len(content) if length is None else length
    return (
        struct.pack(">I", length) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of(width: int, height: int, data: bytes, *extra: bytes, color: int = 2) -> bytes:
    """A PNG with any size in its header, whatever its data."""
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return b"".join(
        (SIGNATURE, chunk(b"IHDR", header), *extra, chunk(b"IDAT", data), chunk(b"IEND", b""))
    )


def jpeg(**options: Any) -> bytes:
    return encoded(Image.effect_noise((64, 48), 90).convert("RGB"), "JPEG", **options)


def many_scans(scans: int, side: int) -> bytes:
    """A progressive JPEG that refines all of its coefficients again and again."""
    file = bytearray(jpeg(progressive=True))
    frame = file.index(b"\xff\xc2")
    file[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    last = file.rindex(b"\xff\xda")
    return bytes(file[:last]) + bytes(file[last:-2]) * scans + b"\xff\xd9"


def bmp(width: int, height: int, bits: int = 24, compression: int = 0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 300, 0, 0, 54) + header + bytes(300)


def tiff(*entries: tuple[int, int, int, int], next_offset: int = 0) -> bytes:
    """A TIFF of 8-bit gray. entries: tag, type, count and value, instead of the defaults."""
    tags = {256: (4, 1, 16), 257: (4, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    tags |= {273: (4, 1, 256), 277: (3, 1, 1), 278: (4, 1, 16), 279: (4, 1, 256)}
    tags |= {tag: (kind, count, value) for tag, kind, count, value in entries}
    rows = [struct.pack("<HHII", tag, *values) for tag, values in sorted(tags.items())]
    directory = struct.pack("<H", len(rows)) + b"".join(rows) + struct.pack("<I", next_offset)
    return (b"II*\0" + struct.pack("<I", 8) + directory).ljust(256, b"\0") + bytes(256)


def exif(orientation: int | bytes) -> bytes:
    """A JPEG with an EXIF block that is raw bytes, or only has an orientation."""
    if isinstance(orientation, bytes):
        return jpeg(exif=b"Exif\0\0" + orientation)
    data = Image.Exif()
    data[0x0112] = orientation
    return jpeg(exif=data.tobytes())


def frames(count: int, kind: str) -> bytes:
    images = [Image.new("RGB", (8, 8), (number % 256, 0, 0)) for number in range(count)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:])


def mode(name: str, value: Any, kind: str = "TIFF") -> bytes:
    return encoded(Image.fromarray(np.full((9, 9), value), None).convert(name), kind)


def zeros(count: int) -> bytes:
    """Zeros, compressed without holding all of them."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join((*parts, packer.flush()))


# The content of a file, and what must happen.
FILES: dict[str, tuple[Callable[[], bytes], Expected]] = {
    "empty": (lambda: b"", "refuse"),
    "one byte": (lambda: b"\xff", "refuse"),
    "text": (lambda: b"hello", "refuse"),
    "HTML": (lambda: b"<html><img src=a.png></html>", "refuse"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "refuse"),
    "SVG with an entity bomb": (lambda: b"<!DOCTYPE a [<!ENTITY b 'bb'>]><svg>&b;</svg>", "refuse"),
    "PDF": (lambda: b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj", "refuse"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nloop", "refuse"),
    "ZIP": (lambda: b"PK\3\4" + bytes(100), "refuse"),
    "icon": (lambda: b"\0\0\1\0\1\0" + bytes(100), "refuse"),
    "random bytes": (lambda: np.random.default_rng(0).bytes(10_000), "refuse"),
    "10 MB of zeros": (lambda: bytes(10 << 20), "refuse"),
    "PNG: only the signature": (lambda: SIGNATURE, "refuse"),
    "PNG: cut in the middle": (lambda: png()[:50], "refuse"),
    "PNG: wrong checksum": (lambda: png().replace(b"IDAT", b"IDAX"), "refuse"),
    "PNG: chunk of 4 GB": (lambda: SIGNATURE + chunk(b"IHDR", bytes(13), 2**32 - 1), "refuse"),
    "PNG: 0 x 0": (lambda: png_of(0, 0, zlib.compress(b"")), "refuse"),
    "PNG: 2^31 x 2^31": (lambda: png_of(2**31, 2**31, b""), "refuse"),
    "PNG: 10,000 x 10,000": (lambda: png_of(10_000, 10_000, zeros(300 << 20)), "refuse"),
    "PNG: 8,000 x 8,000": (lambda: png_of(8000, 8000, zeros(184 << 20)), "either"),
    "PNG: 60,000 x 1": (lambda: encoded(Image.new("RGB", (60_000, 1))), "answer"),
    "PNG: 1 x 60,000": (lambda: encoded(Image.new("RGB", (1, 60_000))), "answer"),
    "PNG: 1 x 1": (lambda: encoded(Image.new("RGB", (1, 1))), "answer"),
    "PNG: data of 1 GB for 9 pixels": (lambda: png_of(3, 3, zeros(1 << 30)), "either"),
    "PNG: text of 1 GB": (
        lambda: png_of(3, 3, zlib.compress(bytes(30)), chunk(b"zTXt", b"a\0\0" + zeros(1 << 30))),
        "either",
    ),
    "PNG: color profile of 1 GB": (
        lambda: png_of(3, 3, zlib.compress(bytes(30)), chunk(b"iCCP", b"a\0\0" + zeros(1 << 30))),
        "either",
    ),
    "PNG: 100,000 chunks": (
        lambda: png_of(3, 3, zlib.compress(bytes(30)), chunk(b"tEXt", b"a\0b") * 100_000),
        "either",
    ),
    "PNG: no palette": (
        lambda: png_of(3, 3, zlib.compress(bytes(12)), color=3),
        "either",
    ),
    "PNG: fully transparent": (lambda: encoded(Image.new("RGBA", (9, 9), (9, 9, 9, 0))), "answer"),
    "PNG: 16 bits": (lambda: mode("I;16", np.uint16(40_000), "PNG"), "answer"),
    "PNG: 1 bit": (lambda: encoded(Image.new("1", (9, 9), 1)), "answer"),
    "JPEG: cut in the header": (lambda: jpeg()[:100], "refuse"),
    "JPEG: cut in the middle": (lambda: jpeg()[:900], "refuse"),
    "JPEG: only markers": (lambda: b"\xff\xd8" + b"\xff\xe0\0\2" * 100_000, "refuse"),
    "JPEG: 65,535 x 65,535": (lambda: many_scans(1, 65_535), "refuse"),
    "JPEG: 2,000 scans": (lambda: many_scans(2000, 8000), "refuse"),
    "JPEG: 90 scans of 64 megapixels": (lambda: many_scans(90, 8000), "either"),
    "JPEG: 2,000 small scans": (lambda: many_scans(2000, 64), "either"),
    "JPEG: CMYK": (lambda: encoded(Image.new("CMYK", (9, 9)), "JPEG"), "answer"),
    "JPEG: gray": (lambda: encoded(Image.new("L", (9, 9)), "JPEG"), "answer"),
    "JPEG: orientation 0": (lambda: exif(0), "answer"),
    "JPEG: orientation 6": (lambda: exif(6), "answer"),
    "JPEG: orientation 65,535": (lambda: exif(65_535), "answer"),
    "JPEG: EXIF is garbage": (lambda: exif(b"II*\0\xff\xff\xff\xff" + bytes(50)), "answer"),
    "JPEG: EXIF loops": (lambda: exif(tiff(next_offset=8)), "answer"),
    "GIF: no frame": (lambda: b"GIF89a\1\0\1\0\0\0\0;", "refuse"),
    "GIF: 3,000 frames": (lambda: frames(3000, "GIF"), "answer"),
    "GIF: 65,535 x 65,535": (lambda: b"GIF89a\xff\xff\xff\xff\0\0\0" + b",", "refuse"),
    "GIF: cut": (lambda: frames(2, "GIF")[:40], "refuse"),
    "WebP: 300 frames": (lambda: frames(300, "WEBP"), "answer"),
    "WebP: cut": (lambda: encoded(Image.new("RGB", (99, 99)), "WEBP")[:40], "refuse"),
    "WebP: size of 4 GB": (lambda: b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff", "refuse"),
    "BMP: negative height": (lambda: bmp(9, -9), "answer"),
    "BMP: height of -2^31": (lambda: bmp(9, -(2**31)), "refuse"),
    "BMP: 3 bits": (lambda: bmp(9, 9, 3), "refuse"),
    "BMP: unknown compression": (lambda: bmp(9, 9, 24, 99), "refuse"),
    "TIFF: strip of 4 GB": (lambda: tiff((279, 4, 1, 2**32 - 1)), "either"),
    "TIFF: strip behind the end": (lambda: tiff((273, 4, 1, 2**31)), "refuse"),
    "TIFF: 2^31 samples": (lambda: tiff((277, 4, 1, 2**31)), "refuse"),
    "TIFF: 65,535 samples": (lambda: tiff((277, 3, 1, 65_535)), "refuse"),
    "TIFF: 2^31 strips": (lambda: tiff((273, 4, 2**31, 8)), "refuse"),
    "TIFF: directory loops": (lambda: tiff(next_offset=8), "answer"),
    "TIFF: compressed by JPEG": (lambda: tiff((259, 3, 1, 7)), "refuse"),
    "TIFF: rows of 2^32 - 1": (lambda: tiff((278, 4, 1, 2**32 - 1)), "either"),
    "TIFF: not a number": (lambda: mode("F", np.float32("nan")), "answer"),
    "TIFF: 1e38": (lambda: mode("F", np.float32(1e38)), "answer"),
    "PPM: 10^9 x 10^9": (lambda: b"P6 1000000000 1000000000 255 ", "refuse"),
    "PPM: 10^5,000 pixels": (lambda: b"P6 1" + b"0" * 5000 + b" 1 255 ", "refuse"),
    "PPM: endless comment": (lambda: b"P6 #" + b"a" * 1_000_000, "refuse"),
    "PPM: in text, cut": (lambda: b"P3 8000 8000 255 " + b"1 " * 1000, "refuse"),
    "JPEG 2000: 64 megapixels": (
        lambda: encoded(Image.new("L", (8000, 8000)), "JPEG2000", num_resolutions=1),
        "either",
    ),
    "JPEG 2000: cut": (lambda: encoded(Image.new("L", (99, 99)), "JPEG2000")[:120], "refuse"),
    "AVIF: cut": (lambda: encoded(Image.new("RGB", (99, 99)), "AVIF")[:200], "refuse"),
    "AVIF: box of 2^64": (lambda: b"\0\0\0\x1cftypavif" + b"\xff" * 200, "refuse"),
}

PNG_URL = data_url(png())
BASE64 = PNG_URL.partition(",")[2]

# Values of the input `image`.
URLS: dict[str, tuple[Any, Expected]] = {
    "no padding": (PNG_URL.rstrip("="), "answer"),
    "too much padding": (PNG_URL + "=" * 1000, "answer"),
    "10 MB of padding": (PNG_URL + "=" * (10 << 20), "either"),
    "white space": ("data:image/png;base64," + "\r\n ".join(BASE64), "answer"),
    "other alphabet": (PNG_URL.replace("+", "-").replace("/", "_"), "either"),
    "percent-encoded": ("data:image/png;base64," + BASE64.replace("=", "%3D"), "answer"),
    "upper case": ("DATA:" + PNG_URL[5:], "either"),
    "no comma": (PNG_URL.replace(",", ""), "refuse"),
    "no base64": ("data:image/png,hello", "refuse"),
    "no type": ("data:;base64," + BASE64, "answer"),
    "type of text": ("data:text/html;base64," + BASE64, "either"),
    "not base64": ("data:image/png;base64,!!!!", "refuse"),
    "one letter": ("data:image/png;base64,A", "refuse"),
    "lone surrogate": ("data:image/png;base64,\ud800", "refuse"),
    "other letters": ("data:image/png;base64,äöü", "refuse"),
    "only a scheme": ("data:", "refuse"),
    "empty text": ("", "refuse"),
    "space": (" ", "refuse"),
    "word": ("picture", "refuse"),
    "path": ("/etc/passwd", "refuse"),
    "path above": ("../../../etc/passwd", "refuse"),
    "file address": ("file:///etc/passwd", "refuse"),
    "FTP address": ("ftp://127.0.0.1/a.png", "refuse"),
    "script": ("javascript:alert(1)", "refuse"),
    "NUL": ("\0", "refuse"),
    "1 MB of letters": ("a" * 1_000_000, "refuse"),
    "number": (5, "refuse"),
    "true": (True, "refuse"),
    "null": (None, "either"),
    "list": ([PNG_URL], "refuse"),
    "object": ({"url": PNG_URL}, "refuse"),
}

# Values of the input `images`.
LISTS: dict[str, tuple[Any, Expected, str]] = {
    "empty list": ([], "answer", ""),
    "text": (PNG_URL, "refuse", "images"),
    "list in a list": ([[PNG_URL]], "refuse", "images"),
    "null in a list": ([None], "refuse", "images"),
    "number in a list": ([PNG_URL, 5], "refuse", "images"),
    "object": ({"0": PNG_URL}, "refuse", "images"),
    "damaged in the middle": ([PNG_URL, data_url(png()[:60]), PNG_URL], "refuse", "images[1]"),
    "path in the middle": ([PNG_URL, "a.png"], "refuse", "images[1]"),
    "20": ([PNG_URL] * 20, "either", "images"),
    "33": ([PNG_URL] * 33, "either", "images"),
    "1,000": ([PNG_URL] * 1000, "refuse", "images"),
    "100,000": ([PNG_URL[:30]] * 100_000, "refuse", "images"),
}


def image_cases() -> Iterator[Case]:
    """Yield all cases."""

    def with_file(build: Callable[[], bytes]) -> dict[str, Any]:
        return QUESTION | {"image": data_url(build())}

    for name, (build, expected) in FILES.items():
        yield Case("images", name, predict(partial(with_file, build)), expected, "image")
    for name, (value, expected) in URLS.items():
        inputs = QUESTION | {"image": value}
        yield Case("image inputs", f"image: {name}", predict(inputs), expected, "image")
    for name, (value, expected, named) in LISTS.items():
        inputs = QUESTION | {"images": value}
        yield Case("image inputs", f"images: {name}", predict(inputs), expected, named)
