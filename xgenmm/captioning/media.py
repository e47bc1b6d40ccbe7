"""Read the image or video of a record: from a file, a byte range of a tar, or a URL."""

import io
import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from threading import BoundedSemaphore
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from xgenmm.captioning.records import Record
from xgenmm.captioning.untrusted import open_file, shorten
from xgenmm.config import INTERLEAVE, VIDEO_128, XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.preprocessing.decoders import DecodeLimits, ImageDecoders
from xgenmm.preprocessing.fetch import FetchLimits, start_fetch
from xgenmm.preprocessing.images import FORMATS, read_image
from xgenmm.preprocessing.tiling import TiledImage, tile_image
from xgenmm.preprocessing.video import FrameSelection

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
)
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".m2ts", ".flv", ".wmv"}
    | {".ogv", ".3gp"}
)
MAX_IMAGE_BYTES = FetchLimits.max_bytes
"""Larger images, in files or in tars, are not read. For videos, see `VideoLimits.file_bytes`."""

MAX_DECODE_PROCESSES = min(os.cpu_count() or 1, 16)
"""Videos decoded at once. Each is held in memory, up to `VideoLimits.file_bytes`."""


def video_suffixes(config: XGenMMConfig) -> frozenset[str]:
    """The suffixes of the files that a model takes as videos; empty if it takes none.

    A GIF is a video for video models. For others it is an image: its first frame.
    """
    if config.temporal is not None:
        return VIDEO_SUFFIXES | {".gif"}
    return VIDEO_SUFFIXES if config.frames_as_images else frozenset()


def media_suffix(name: str) -> str:
    """The suffix of a path or a URL, in lower case."""
    if is_url(name):
        name = name.partition("#")[0].partition("?")[0]
    return PurePosixPath(name).suffix.lower()


class MediaReader:
    """Reads the image of a record, or frames of its video, into tiles.

    A video is decoded in a process of its own, within the limits of `VideoLimits`. All methods may
    be called from any thread.

    Args:
        config: of the model that gets the tiles.
        selection: frames to take from each video.
        limits: of each download.
        processes: videos to decode at once.
    """

    def __init__(
        self,
        config: XGenMMConfig,
        selection: FrameSelection,
        limits: FetchLimits,
        processes: int = MAX_DECODE_PROCESSES,
    ) -> None:
        self._config, self._selection, self._limits = config, selection, limits
        self._suffixes = video_suffixes(config)
        decode_limits = DecodeLimits(processes=processes)
        self._max_video_bytes = decode_limits.video.file_bytes
        self._decoders = ImageDecoders(config.tiling, config.vision.image_size, decode_limits)
        self._slots = BoundedSemaphore(processes)  # bounds the memory of encoded videos

    def start_download(self, record: Record) -> Future[bytes] | None:
        """Start to download the image or video of a record; None if it is in a file."""
        return start_download(record, self._limits, video=bool(self._suffixes))

    def read(self, record: Record, download: Future[bytes] | None) -> list[TiledImage]:
        """Return the tiles of a record's image, or of each frame of its video.

        download: what `start_download` returned.

        Raises InputError if the image or video cannot be read, downloaded or decoded, or if the
        model takes no videos.
        """
        if not self._is_video(record, download):
            image = load_image(record, download)
            return [tile_image(image, self._config.tiling, self._config.vision.image_size)]
        mode = self._config.frame_tiling.mode
        with self._slots:
            with _open_content(record, download, "video", self._max_video_bytes) as file:
                content = file.read()
            return list(self._decoders.read_video(content, "video", self._selection, mode).frames)

    def close(self) -> None:
        """End the processes, waiting for those that are busy. They also end with this process."""
        self._decoders.close()

    def _is_video(self, record: Record, download: Future[bytes] | None) -> bool:
        """Whether a record is a video: by the suffix of its name, or else by its content."""
        suffix = media_suffix(record.image)
        if suffix in self._suffixes:
            return True
        if suffix in VIDEO_SUFFIXES:
            raise InputError(
                "video", f"this model takes no videos; use {VIDEO_128} or {INTERLEAVE}"
            )
        if suffix in IMAGE_SUFFIXES or not self._suffixes:
            return False
        with _open_content(record, download, "image", self._max_video_bytes) as file:
            try:
                image = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError:
                return True
            except Exception:  # `load_image` will say what is wrong with the image
                return False
            return image.format == "GIF" and ".gif" in self._suffixes


def start_download(
    record: Record, limits: FetchLimits, *, video: bool = False
) -> Future[bytes] | None:
    """Start to download the image of a record; None if it is in a file.

    video: whether it may be a video instead.
    """
    if record.error is None and is_url(record.source):
        name = "video" if video and media_suffix(record.image) in VIDEO_SUFFIXES else "image"
        return start_fetch(record.source, limits, name, kind="video" if video else "image")
    return None


def load_image(record: Record, download: Future[bytes] | None) -> Image.Image:
    """Return a record's image, upright and in RGB.

    download: what `start_download` returned.

    Raises InputError if the image cannot be read, downloaded or decoded.
    """
    with _open_content(record, download, "image", MAX_IMAGE_BYTES) as file:
        return read_image(file)


@contextmanager
def _open_content(
    record: Record, download: Future[bytes] | None, name: str, max_bytes: int
) -> Iterator[BinaryIO]:
    """Open the image or video of a record; errors name it `name`.

    max_bytes: limit of what is read from a file; a download has its own.
    """
    if download is not None:
        yield io.BytesIO(download.result())
        return
    try:
        with open_file(Path(record.source)) as file:
            size = file.seek(0, 2) if record.size is None else record.size
            if size > max_bytes:
                raise InputError(name, f"has {size} bytes, more than the {max_bytes} allowed")
            file.seek(record.offset)
            yield file if record.size is None else io.BytesIO(file.read(record.size))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        problem = f"cannot read {shorten(record.source)!r} ({shorten(str(error))})"
        raise InputError(name, problem) from error


def is_url(source: str) -> bool:
    """Whether `source` is an http(s) URL rather than a path."""
    return source.startswith(("http://", "https://"))
