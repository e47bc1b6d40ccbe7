"""Load the image of a record: from a file, a byte range of a tar, or a URL."""

from concurrent.futures import Future
from pathlib import Path

from PIL import Image

from xgenmm.captioning.records import Record
from xgenmm.captioning.untrusted import open_file, shorten
from xgenmm.errors import InputError
from xgenmm.preprocessing.fetch import FetchLimits, start_fetch
from xgenmm.preprocessing.images import read_image

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
)
MAX_IMAGE_BYTES = FetchLimits.max_bytes
"""Larger files, and larger members of a tar, are not read."""


def start_download(record: Record, limits: FetchLimits) -> Future[bytes] | None:
    """Start to download the image of a record; None if it is in a file."""
    if record.error is None and is_url(record.source):
        return start_fetch(record.source, limits)
    return None


def load_image(record: Record, download: Future[bytes] | None) -> Image.Image:
    """Return a record's image, upright and in RGB.

    download: what `start_download` returned.

    Raises InputError if the image cannot be read, downloaded or decoded.
    """
    if download is not None:
        return read_image(download.result())
    try:
        with open_file(Path(record.source)) as file:
            size = file.seek(0, 2) if record.size is None else record.size
            if size > MAX_IMAGE_BYTES:
                raise InputError(
                    "image", f"has {size} bytes, more than the {MAX_IMAGE_BYTES} allowed"
                )
            if record.size is None:
                return read_image(file)
            file.seek(record.offset)
            return read_image(file.read(record.size))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        problem = f"cannot read {shorten(record.source)!r} ({shorten(str(error))})"
        raise InputError("image", problem) from error


def is_url(source: str) -> bool:
    """Whether `source` is an http(s) URL rather than a path."""
    return source.startswith(("http://", "https://"))
