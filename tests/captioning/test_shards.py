"""The output folder: locking, folders it must not overwrite, and rows written on an error."""

import io
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
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
        (broken, r"broken/_settings\.json: not valid JSON"),
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


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b'{"id": "0", "ima', "line 1: not valid JSON"),
        (b'{"id": "0", "image": "a"}\n[]\n', "line 2: not a JSON object but a list"),
        (b'{"id": "0"}\n', "line 1: an id or image is not a text but None"),
        (b"[" * 200_000 + b"]" * 200_000, "line 1: JSON that is nested too deeply"),
        (b'{"id": "0", "image": "a"}\n' * 2 + b'{"id": "1", "image": "a"}\n', "rows of a record"),
    ],
    ids=["empty", "cut", "list", "no image", "deep", "cut at a line end"],
)
def test_damaged_json_shard_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    check_shard_is_named(tmp_path, "part-00000.jsonl", content, problem)


@pytest.mark.parametrize("columns", [{}, {"id": ["0"]}, {"id": [0], "image": ["a"]}])
def test_damaged_parquet_shard_is_named(tmp_path: Path, columns: dict[str, list[object]]) -> None:
    file = io.BytesIO()
    if columns:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    check_shard_is_named(tmp_path, "part-00000.parquet", file.getvalue(), "")


def test_foreign_and_repeated_shards_are_named(tmp_path: Path) -> None:
    line = b'{"id": "0", "image": "a"}\n'
    check_shard_is_named(tmp_path / "a", "part-x.jsonl", line, "its name has no number")
    check_shard_is_named(tmp_path / "b", "part-00001.jsonl", line, "another shard has rows of 0")


def check_shard_is_named(output: Path, name: str, content: bytes, problem: str) -> None:
    """Open an OUTPUT with a good shard and this one, and check the error."""
    format_ = name.rpartition(".")[2]
    with open_shards(output, format_, 1, {}) as shards:
        shards.add([Row("0", "a", "What?")])
    (output / name).write_bytes(content)
    message = rf"^OUTPUT: .*/{name} is damaged or not a shard of this program \(.*{problem}"
    with pytest.raises(InputError, match=message), open_shards(output, format_, 1, {}):
        pass


def test_shard_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    def fail() -> None:
        with open_shards(tmp_path / "out", "jsonl", 1, {}) as shards:
            shutil.rmtree(tmp_path / "out")
            shards.add([Row("0", "a.png", "What?")])

    with pytest.raises(InputError, match=r"^OUTPUT: cannot write .*/part-00000\.jsonl \("):
        fail()
