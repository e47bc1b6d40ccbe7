"""Images decoded in processes of their own: equal tiles, and an end to files that cost too much."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.paths import DEMO
from xgenmm.config import TilingConfig
from xgenmm.errors import InputError
from xgenmm.preprocessing.decoders import DecodeLimits, ImageDecoders
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.tiling import tile_image

TILING, TILE_SIZE = TilingConfig(), 384
SCENE = (DEMO / "examples" / "scene-8.png").read_bytes()
LIMITS = DecodeLimits(seconds=1, memory_bytes=400 << 20, processes=1)


@pytest.fixture(scope="module")
def decoders() -> Iterator[ImageDecoders]:
    started = ImageDecoders(TILING, TILE_SIZE, LIMITS)
    yield started
    started.close()


def assert_decodes(decoders: ImageDecoders) -> None:
    tiled = decoders.reader()(SCENE, "image")
    expected = tile_image(read_image(SCENE), TILING, TILE_SIZE)
    np.testing.assert_array_equal(tiled.pixels, expected.pixels)
    assert (tiled.columns, tiled.rows) == (expected.columns, expected.rows)
    assert tiled.image_size == expected.image_size


def png(mode: str, size: tuple[int, int], extra_chunks: bytes = b"") -> bytes:
    """A PNG of one color, made without its pixels in memory."""
    file = io.BytesIO()
    Image.new(mode, (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    rows = zlib.compress(bytes((1 + len(Image.new(mode, (1, 1)).tobytes()) * size[0]) * size[1]))
    return bytes(content[:33]) + extra_chunks + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def test_tiles_equal_those_of_this_process(decoders: ImageDecoders) -> None:
    assert_decodes(decoders)


def test_error_names_the_image(decoders: ImageDecoders) -> None:
    with pytest.raises(InputError, match=r"^images\[2\]: the file is not an image"):
        decoders.reader()(b"hello", "images[2]")
    assert_decodes(decoders)


def test_file_that_takes_too_long_is_refused(decoders: ImageDecoders) -> None:
    slow = png("L", (8, 8), chunk(b"abCd", b"") * 10**6)  # Pillow reads each chunk in Python
    with pytest.raises(InputError, match=r"^image: takes too long to decode"):
        decoders.reader()(slow, "image")
    assert_decodes(decoders)


def test_images_of_a_request_share_its_time(decoders: ImageDecoders) -> None:
    read = decoders.reader()
    slow = png("L", (8, 8), chunk(b"abCd", b"") * 10**5)

    def read_often() -> None:
        for _ in range(100):
            read(slow, "image")

    read(slow, "image")
    with pytest.raises(InputError, match=r"^image: takes too long to decode"):
        read_often()
    assert_decodes(decoders)


def test_file_that_takes_too_much_memory_is_refused(decoders: ImageDecoders) -> None:
    large = png("RGBA", (4000, 4000))
    with pytest.raises(InputError, match=r"^image: the PNG file takes too much memory"):
        decoders.reader()(large, "image")
    assert_decodes(decoders)


def test_process_that_died_is_replaced() -> None:
    before = psutil.Process().children()
    with closing(ImageDecoders(TILING, TILE_SIZE, LIMITS)) as decoders:
        assert_decodes(decoders)
        (process,) = set(psutil.Process().children()) - set(before)
        process.kill()
        process.wait()
        assert_decodes(decoders)


def test_closing_ends_the_processes() -> None:
    before = psutil.Process().children()
    decoders = ImageDecoders(TILING, TILE_SIZE, LIMITS)
    assert_decodes(decoders)
    decoders.close()
    assert psutil.Process().children() == before
