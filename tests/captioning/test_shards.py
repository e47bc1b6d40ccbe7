"""The output folder: locking, folders it must not overwrite, and rows written on an error."""

from pathlib import Path

import pytest

from tests.captioning.dataset import read_rows
from xgenmm import InputError
from xgenmm.captioning.records import Row
from xgenmm.captioning.shards import SETTINGS_FILE, open_shards


def test_only_one_process_writes_to_an_output(tmp_path: Path) -> None:
    with (
        open_shards(tmp_path / "out", "jsonl", 1, {}),
        pytest.raises(InputError, match=r"^OUTPUT: another process is writing to"),
        open_shards(tmp_path / "out", "jsonl", 1, {}),
    ):
        pass


def test_output_that_is_not_a_caption_folder_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / SETTINGS_FILE).write_text("{")
    (broken / "part-00000.jsonl").write_text("")
    for output, message in (
        (tmp_path, "contains other files"),
        (file, "is a file"),
        (file / "out", "cannot create"),
        (broken, "is not valid JSON"),
    ):
        with pytest.raises(InputError, match=message), open_shards(output, "jsonl", 1, {}):
            pass


def test_rows_are_written_when_the_with_block_raises(tmp_path: Path) -> None:
    def fail() -> None:
        with open_shards(tmp_path / "out", "parquet", 100, {}) as shards:
            shards.add([Row("0", "a.png", "What?", "A \udcff.")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [row["text"] for row in read_rows(tmp_path / "out")] == ["A \\udcff."]
