"""Files inside of URLs: `data:image/png;base64,...` (RFC 2397)."""

import binascii
import io
import string
from urllib.parse import unquote_to_bytes

from xgenmm.errors import InputError

_TO_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_IGNORED = string.whitespace.encode() + b"="
_PIECE = 1 << 18  # bytes decoded at once, for other threads to run in between


def decode_data_url(url: str, name: str = "image") -> bytes:
    """Return the content of a data URL.

    Base64 may be of either alphabet (RFC 4648), without padding, with white space, and
    percent-encoded.

    Raises InputError, naming the input, if the URL is not valid.
    """
    header, comma, data = url.partition(",")
    if not comma:
        raise InputError(name, "the data URL has no comma; send data:TYPE;base64,...")
    try:
        content = unquote_to_bytes(data)
        if header.rstrip().lower().endswith(";base64"):
            content = _decode_base64(content)
    except ValueError as error:  # invalid base64 or a lone surrogate
        problem = f"the data URL is not valid ({error}); encode the file again"
        raise InputError(name, problem) from error
    return content


def _decode_base64(text: bytes) -> bytes:
    """Decode piece by piece: a video in one go would stop all threads for most of a second."""
    content, rest = io.BytesIO(), b""
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE].translate(_TO_STANDARD_ALPHABET, _IGNORED)
        piece = rest + piece
        whole = len(piece) // 4 * 4
        content.write(binascii.a2b_base64(piece[:whole], strict_mode=True))
        rest = piece[whole:]
    content.write(binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True))
    return content.getvalue()
