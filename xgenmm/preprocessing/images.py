"""Decoding of image files to 8-bit RGB, upright, at most `MAX_PIXELS`.

Files are untrusted: the size is checked from the header before any pixel is decoded, and only
`FORMATS` are tried, since Pillow passes some others to external programs (EPS to Ghostscript).
"""

import io
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from xgenmm.errors import InputError

MAX_PIXELS = 64_000_000

MAX_SCANS = 100
"""Most scans of a JPEG file, each of which takes time for all pixels; encoders write about 10."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")

_COMMON_FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"

_ORIENTATION_TAG = 0x0112
_UPRIGHT_TRANSFORM = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transform that undoes each EXIF orientation (EXIF 2.32, tag 274); 1 is upright already."""


def read_image(
    source: bytes | str | os.PathLike[str] | BinaryIO, name: str = "image"
) -> Image.Image:
    """Decode an image to upright RGB.

    Animations yield their first frame. Transparent pixels are composited over white: dropping the
    alpha channel, as the original implementation does, exposes whatever color the file stores
    there, often black, and black text on a transparent background disappears. 16-bit gray levels
    are scaled to 8 bits, not clipped. Color profiles are ignored.

    Args:
        source: the encoded bytes, a path, or a file opened in binary mode.
        name: the input's name in error messages.

    Raises:
        InputError: the file is missing, empty, damaged, not an image, or has more than
            `MAX_PIXELS` pixels.
    """
    with _open(source, name) as file:
        image = _read_header(file, name)
        _check_size(image, name)
        _check_scans(image, file, name)
        try:
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
        except MemoryError as error:
            raise InputError(
                name, f"the {image.format} file takes too much memory to decode; make it smaller"
            ) from error
        except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
            raise InputError(
                name, f"the {image.format} file is damaged or cut short ({error}); send it again"
            ) from error
    if orientation in _UPRIGHT_TRANSFORM:
        rgb = rgb.transpose(_UPRIGHT_TRANSFORM[orientation])
    rgb.info.clear()  # an orientation left here would be applied a second time
    return rgb


def _open(
    source: bytes | str | os.PathLike[str] | BinaryIO, name: str
) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        try:
            return Path(source).open("rb")
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                name, f"cannot open {os.fspath(source)!r} ({reason}); give the path of an image"
            ) from error
    if source.seekable():
        return nullcontext(source)
    return io.BytesIO(source.read())


def _read_header(file: BinaryIO, name: str) -> Image.Image:
    """Identify the image and read its size, without decoding pixels."""
    if file.seek(0, io.SEEK_END) == 0:
        raise InputError(name, f"the file is empty; send a {_COMMON_FORMATS} image")
    file.seek(0)
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, "far more pixels") from error
    except UnidentifiedImageError as error:
        raise InputError(
            name, f"the file is not an image or is damaged; send a {_COMMON_FORMATS} image"
        ) from error
    except Exception as error:  # as in `read_image`
        raise InputError(
            name, f"the file is damaged or cut short ({error}); send it again"
        ) from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height} pixels, more")


def _check_scans(image: Image.Image, file: BinaryIO, name: str) -> None:
    if not isinstance(image, JpegImageFile):
        return
    file.seek(0)
    scans = file.read().count(b"\xff\xda")  # coded pixels do not contain a marker
    if scans > MAX_SCANS:
        raise InputError(
            name,
            f"the JPEG file has {scans} scans, more than {MAX_SCANS}; save it again",
        )


def _too_large(name: str, size: str) -> InputError:
    limit = MAX_PIXELS // 1_000_000
    return InputError(
        name, f"the image has {size} than the {limit} megapixels allowed; make it smaller"
    )


def _orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken EXIF data does not make the image unusable
        return None
    return value if isinstance(value, int) else None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, as a new image."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_8_bit(image).convert("RGB")
    if image.has_transparency_data:
        overlay = image.convert("RGBA")
        white = Image.new("RGBA", overlay.size, "white")
        return Image.alpha_composite(white, overlay).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit, 32-bit or float grayscale to 8 bits (mode "L").

    White is 65535 for integers and 1.0 for floats. If any value lies outside, the white point is
    unknown and the image's own minimum and maximum become black and white. NaN and infinity
    become 0.
    """
    levels = np.array(image, dtype=np.float64)
    np.nan_to_num(levels, copy=False, nan=0, posinf=0, neginf=0)
    black, white = 0.0, 1.0 if image.mode == "F" else 65535.0
    if levels.min() < black or levels.max() > white:
        black, white = levels.min(), levels.max()
    levels -= black
    if white > black:
        levels *= 255 / (white - black)
    return Image.fromarray(np.rint(levels, out=levels).astype(np.uint8))
