"""Load the image of a record: from a file, a byte range of a tar, or a URL."""

import functools
import time
from pathlib import Path

import httpx
from PIL import Image

from xgenmm.captioning.records import Record
from xgenmm.errors import InputError
from xgenmm.preprocessing.images import read_image

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
)
MAX_DOWNLOAD_BYTES = 200_000_000
MAX_DOWNLOAD_SECONDS = 120.0
SOCKET_TIMEOUT_SECONDS = 30.0


def load_image(record: Record) -> Image.Image:
    """Return a record's image, upright and in RGB.

    Raises InputError if it cannot be read, downloaded or decoded.
    """
    try:
        if is_url(record.source):
            return read_image(_download(record.source))
        with Path(record.source).open("rb") as file:
            if record.size is None:
                return read_image(file)
            file.seek(record.offset)
            return read_image(file.read(record.size))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise InputError("image", f"cannot read {record.source!r} ({error})") from error


def is_url(source: str) -> bool:
    """Whether `source` is an http(s) URL rather than a path."""
    return source.startswith(("http://", "https://"))


def _download(url: str) -> bytes:
    content, started = bytearray(), time.monotonic()
    try:
        with _client().stream("GET", url) as response:
            if response.status_code != httpx.codes.OK:
                raise InputError("image", f"{url} returned HTTP {response.status_code}")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_DOWNLOAD_BYTES:
                    raise InputError("image", f"{url} has more than {MAX_DOWNLOAD_BYTES} bytes")
                if time.monotonic() - started > MAX_DOWNLOAD_SECONDS:
                    raise InputError(
                        "image", f"{url} takes longer than {MAX_DOWNLOAD_SECONDS:.0f} s"
                    )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError("image", f"cannot fetch {url} ({error})") from error
    return bytes(content)


@functools.cache
def _client() -> httpx.Client:
    return httpx.Client(
        follow_redirects=True,
        timeout=SOCKET_TIMEOUT_SECONDS,
        limits=httpx.Limits(max_connections=None),
    )
