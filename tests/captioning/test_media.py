"""Images of records: files that must not be opened or are too large, and downloads by URL."""

import os
from pathlib import Path

import pytest

from tests.captioning.dataset import png
from xgenmm import InputError
from xgenmm.captioning.media import MAX_IMAGE_BYTES, load_image, start_download
from xgenmm.captioning.records import Record
from xgenmm.preprocessing.fetch import FetchLimits


def test_image_is_downloaded(tmp_path: Path, file_server: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    record = Record("0", "", f"{file_server}/a.png")
    assert load_image(record, start_download(record, FetchLimits())).size == (20, 20)
    with pytest.raises(InputError, match="more than 10 bytes"):
        load_image(record, start_download(record, FetchLimits(max_bytes=10)))


def test_file_that_cannot_be_an_image_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")  # opening it would wait for a writer
    (tmp_path / "large.png").write_bytes(png())
    os.truncate(tmp_path / "large.png", MAX_IMAGE_BYTES + 1)
    for path, message in (
        (tmp_path / "fifo.png", r"fifo\.png' \(not a regular file\)$"),
        (Path("/dev/zero"), r"/dev/zero' \(not a regular file\)$"),
        (tmp_path, "not a regular file"),
        (tmp_path / "large.png", "has 200000001 bytes, more than the 200000000 allowed"),
    ):
        with pytest.raises(InputError, match=message):
            load_image(Record("0", "", str(path)), None)
