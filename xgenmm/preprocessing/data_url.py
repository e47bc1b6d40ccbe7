"""Files inside of URLs: `data:image/png;base64,...` (RFC 2397)."""

import binascii
import string
from urllib.parse import unquote_to_bytes

from xgenmm.errors import InputError

_TO_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_IGNORED = string.whitespace.encode() + b"="


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
            content = content.translate(_TO_STANDARD_ALPHABET, _IGNORED)
            padding = b"=" * (-len(content) % 4)
            content = binascii.a2b_base64(content + padding, strict_mode=True)
    except ValueError as error:  # invalid base64 or a lone surrogate
        problem = f"the data URL is not valid ({error}); encode the file again"
        raise InputError(name, problem) from error
    return content
