"""Downloading images by URL; test_sources.py covers images in files."""

from pathlib import Path

import pytest

from tests.captioning.dataset import png
from xgenmm import InputError
from xgenmm.captioning.images import MAX_DOWNLOAD_BYTES, load_image
from xgenmm.captioning.records import Record


def test_images_are_downloaded_up_to_a_size_limit(
    tmp_path: Path, file_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    assert load_image(Record("0", "", f"{file_server}/a.png")).size == (20, 20)
    for url, message in (
        (f"{file_server}/b.png", r"^image: http.*/b\.png returned HTTP 404"),
        ("http://127.0.0.1:9/", r"^image: cannot fetch http"),
        ("http://[", r"^image: cannot fetch http"),
    ):
        with pytest.raises(InputError, match=message):
            load_image(Record("0", "", url))
    assert MAX_DOWNLOAD_BYTES > 1000
    monkeypatch.setattr("xgenmm.captioning.images.MAX_DOWNLOAD_BYTES", 10)
    with pytest.raises(InputError, match="more than 10 bytes"):
        load_image(Record("0", "", f"{file_server}/a.png"))
