"""Data URLs as clients write them, and as they must not be."""

import base64

import pytest

from xgenmm.errors import InputError
from xgenmm.preprocessing.data_url import decode_data_url

CONTENT = b"\xfb\xff\xfe\x00"


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,+//+AA==",
        "data:image/png;base64,+//+AA",
        "data:image/png;base64,-__-AA==",
        "data:image/png;charset=utf-8;base64,+//+AA==",
        "data:;base64,+//+AA==",
        "data:image/png;BASE64,+//+\r\n AA==\n",
        "data:image/png;base64,%2B//%2BAA%3D%3D",
        "data:image/png,%FB%FF%FE%00",
    ],
)
def test_content_is_decoded(url: str) -> None:
    assert decode_data_url(url) == CONTENT


def test_long_content_with_lines_is_decoded_in_pieces() -> None:
    content = bytes(range(251)) * 4000
    url = "data:video/mp4;base64," + base64.encodebytes(content).decode()
    assert decode_data_url(url) == content


def test_empty_content_is_empty() -> None:
    assert decode_data_url("data:,") == decode_data_url("data:image/png;base64,") == b""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:", "has no comma"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,+//+A", "is not valid"),
        ("data:image/png;base64,hello!", "is not valid"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "is not valid"),
        ("data:image/png;base64,\ud800AAA", "is not valid"),
    ],
)
def test_error_names_the_input(url: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"^images\[1\]: the data URL {message}"):
        decode_data_url(url, "images[1]")
