"""Images and videos decoded in other processes: equal tiles, and an end to costly files."""

import io
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.clips import clip, large_frame
from tests.support.paths import DEMO
from xgenmm.config import TilingConfig
from xgenmm.errors import InputError
from xgenmm.preprocessing.decoders import DecodeLimits, ImageDecoders
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.tiling import TiledImage, tile_image
from xgenmm.preprocessing.video import FrameSelection, Video, read_video
from xgenmm.preprocessing.video_decoder import VideoLimits

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


def tile_in_this_process(content: bytes, tiling: TilingConfig, **selection: Any) -> list[bytes]:
    frames = read_video(content, **selection).frames
    return [tile_image(frame, tiling, TILE_SIZE).pixels.tobytes() for frame in frames]


def tiles(video: Video[TiledImage]) -> list[bytes]:
    return [frame.pixels.tobytes() for frame in video.frames]


def test_frames_of_a_video_are_tiled_like_images(decoders: ImageDecoders) -> None:
    content = clip(count=20)
    video = decoders.read_video(content, selection=FrameSelection(3, start=0.2))
    assert tiles(video) == tile_in_this_process(content, TILING, num_frames=3, start=0.2)
    assert (video.indices, video.times, video.total) == ((5, 12, 19), (0.2, 0.48, 0.76), 20)
    assert video.frames[0].image_size == (96, 64)


@pytest.mark.parametrize("mode", ["pad", "squash"])
def test_frame_is_one_tile_padded_or_squashed(
    mode: Literal["pad", "squash"], decoders: ImageDecoders
) -> None:
    content = clip(count=20)
    video = decoders.read_video(content, mode=mode)
    assert tiles(video) == tile_in_this_process(content, replace(TILING, mode=mode))
    corner = video.frames[0].pixels[0, 0, 0].tolist()
    assert (corner == [127, 127, 127]) == (mode == "pad")  # the mean color


def test_error_names_the_video_or_its_argument(decoders: ImageDecoders) -> None:
    with pytest.raises(InputError, match=r"^clip: is not a video"):
        decoders.read_video(b"hello", "clip")
    with pytest.raises(InputError, match=r"^num_frames: is 21, but clip has 20 frames; set at m"):
        decoders.read_video(clip(count=20), "clip", FrameSelection(21))
    assert_decodes(decoders)


def test_video_that_takes_too_long_is_refused_while_images_are_decoded() -> None:
    limits = DecodeLimits(processes=2, video=VideoLimits(seconds=0.05))
    decoders = ImageDecoders(TILING, TILE_SIZE, limits)
    assert_decodes(decoders)
    content = clip(count=64)
    with ThreadPoolExecutor() as executor:
        video = executor.submit(decoders.read_video, content, selection=FrameSelection(64))
        while not video.done():
            assert_decodes(decoders)
    with pytest.raises(InputError, match=r"^video: takes more than the 0\.05 s of processor time"):
        video.result()
    decoders.close()


def test_video_that_takes_too_much_memory_is_refused() -> None:
    limits = replace(LIMITS, video=VideoLimits(frame_pixels=10**8))
    large = ImageDecoders(TILING, TILE_SIZE, limits)
    with pytest.raises(InputError, match=r"^video: takes too much memory to decode; make it sm"):
        large.read_video(large_frame((64, 64)))
    assert_decodes(large)
    large.close()
