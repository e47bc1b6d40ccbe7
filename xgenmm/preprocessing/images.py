"""A file or its bytes in, one upright RGB image out, or an `InputError` that says what is wrong.

Everything a user may send is settled here, so that the rest of the library sees a single kind of
image: 8-bit RGB, turned as the camera was held, at most `MAX_PIXELS`. Files come from strangers:
the size is checked on the header, before anything is decoded, and only the formats of `FORMATS`
are tried (Pillow would hand some others to outside programs).
"""

import io
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from xgenmm.errors import InputError

MAX_PIXELS = 64_000_000

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")

_KNOWN = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"

_ORIENTATION_TAG = 0x0112
_TURN_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF orientation (EXIF 2.32, tag 274); 1 is upright."""


def read_image(
    source: bytes | str | os.PathLike[str] | BinaryIO, name: str = "image"
) -> Image.Image:
    """Read an image; `name` is the input that errors speak of.

    source: an encoded image's bytes, the path of a file, or a file opened for reading bytes.

    Of an animation the first frame counts. Transparency is laid on white, as a viewer shows it:
    dropping it, as the original does, uncovers whatever colour the file holds underneath, often
    black, so that black writing on a transparent ground would vanish. Grey levels of 16 bits are
    scaled to 8 rather than clipped. Colour profiles are not applied.

    Raises `InputError` for a file that is missing, empty, no image, damaged, or of more than
    `MAX_PIXELS`.
    """
    with _opened(source, name) as file:
        image = _header(file, name)
        _check_size(image, name)
        try:
            image.load()
        except Exception as error:  # damaged files raise nearly anything in Pillow's decoders
            raise InputError(
                name, f"the {image.format} file is damaged or cut short ({error}); send it again"
            ) from error
        orientation = _orientation(image)
        rgb = _rgb(image)
    if orientation in _TURN_UPRIGHT:
        rgb = rgb.transpose(_TURN_UPRIGHT[orientation])
    rgb.info.clear()  # a kept orientation would turn the image a second time
    return rgb


def _opened(
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


def _header(file: BinaryIO, name: str) -> Image.Image:
    """The image with its size known and its pixels not yet decoded."""
    if file.seek(0, io.SEEK_END) == 0:
        raise InputError(name, f"the file is empty; send a {_KNOWN} image")
    file.seek(0)
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, "far more pixels") from error
    except UnidentifiedImageError as error:
        raise InputError(
            name, f"the file is no image or is damaged; send a {_KNOWN} image"
        ) from error
    except Exception as error:  # as in read_picture
        raise InputError(
            name, f"the file is damaged or cut short ({error}); send it again"
        ) from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height} pixels, more")


def _too_large(name: str, size: str) -> InputError:
    limit = MAX_PIXELS // 1_000_000
    return InputError(
        name, f"the image has {size} than the {limit} megapixels allowed; make it smaller"
    )


def _orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # an image with broken EXIF data is still an image
        return None
    return value if isinstance(value, int) else None


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, a new image."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        overlay = image.convert("RGBA")
        white = Image.new("RGBA", overlay.size, "white")
        return Image.alpha_composite(white, overlay).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits, 32 bits or floats -> 8 bits ("L").

    White is 65535 for integers and 1 for floats. Values outside have no white that the file would
    tell: they are stretched from their smallest to their greatest. What is no number is black.
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
