"""Datasets: what is read from INPUT, what is written to OUTPUT, and that it survives its death."""

import csv
import io
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import xgenmm
from tests.support import tiny
from xgenmm import Engine, InputError, Request, SamplingParams
from xgenmm.captioning.datasets import (
    MAX_DOWNLOAD,
    Record,
    Row,
    count_records,
    literal,
    open_shards,
    read_record,
    read_records,
    template_columns,
)
from xgenmm.captioning.program import QUANTIZE, main
from xgenmm.models.quantization import QUANTIZATIONS

COLORS = ("red", "green", "blue", "yellow", "black", "purple", "orange")
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return xgenmm.load(checkpoint)


def encoded(number: int = 0) -> bytes:
    """A PNG; another number gives another image."""
    file = io.BytesIO()
    color = COLORS[number % len(COLORS)]
    Image.new("RGB", (20 + 3 * number % 29, 20 + number), color).save(file, "PNG")
    return file.getvalue()


def draw(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(encoded(number))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def records(source: Path | str, *templates: str, column: str = "image") -> list[Record]:
    return list(read_records(str(source), templates, column))


def rows_of(output: Path) -> list[dict[str, Any]]:
    """All rows, in the order of their records."""
    rows: list[dict[str, Any]] = []
    for path in sorted(output.glob("part-*")):
        if path.suffix == ".parquet":
            rows += pyarrow.parquet.read_table(path).to_pylist()
        else:
            rows += map(json.loads, path.read_text().splitlines())
    return sorted(rows, key=lambda row: row["id"])


def caption(source: Path | str, output: Path, checkpoint: Path, *options: str) -> int:
    files = (str(source), "-o", str(output), "--model", str(checkpoint))
    return main([*files, "--max-new-tokens", str(NEW_TOKENS), *options])


# Input


def test_a_folder(tmp_path: Path) -> None:
    draw(tmp_path / "b", 2)
    (tmp_path / "a.JPG").write_bytes(encoded())
    (tmp_path / "notes.txt").write_text("no image")
    found = records(tmp_path, "What is in {image}?")
    assert [record.id for record in found] == ["a.JPG", "b/000.png", "b/001.png"]
    assert found[1].questions == ("What is in b/000.png?",)
    assert read_record(found[2]).size == (23, 21)


def write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["table.jsonl", "table.csv", "table.parquet"])
def test_a_table(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "images", 2)
    rows = [
        {"file": "images/000.png", "alt": 'a "red" thing,\nor {so}'},
        {"file": "http://127.0.0.1:9/x.png", "alt": ""},
        {"file": "", "alt": "nothing"},
    ]
    write_table(tmp_path / name, rows)
    found = records(tmp_path / name, "Is it {alt}?", "Why?", column="file")
    assert [record.id for record in found] == ["0", "1", "2"]
    assert found[0].questions == ('Is it a "red" thing,\nor {so}?', "Why?")
    assert read_record(found[0]).size == (20, 20)
    assert found[1].source == found[1].image == "http://127.0.0.1:9/x.png"
    assert found[2].error == "image: the column 'file' of this row holds no path and no address"
    assert count_records(str(tmp_path / name), ["{alt}"], "file") == 3


def test_bytes_that_are_no_text_spoil_one_row_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbfimage\n\xff.png\nb.png,more\n")
    assert [record.image for record in records(tmp_path / "table.csv")] == ["\\xff.png", "b.png"]


def test_rows_of_json_may_differ(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text(
        '{"image": "a.png", "tags": ["x", 1], "n": null}\nnot JSON\n[]\n{"image": 3}\n'
    )
    found = records(table, "{tags}{n}")
    assert found[0].questions == ('["x", 1]',)
    assert found[1].error is not None
    assert found[1].error.startswith("INPUT: this line is no JSON (")
    assert found[2].error == "INPUT: this line is no JSON object"
    assert found[3].error == "image: the column 'image' of this row holds no path and no address"
    assert found[3].questions == ("{tags}{n}",)
    assert count_records(str(table), ["{tags}{n}"], "image") == 4
    table.write_text('{"image": "a.png", "tags": "x"}\n{"image": "b.png"}')
    assert records(table, "{tags}")[1].error == "template: this row has no tags"


def test_tars(tmp_path: Path) -> None:
    first = {"s/0.png": encoded(0), "s/0.txt": b"zero", "s/0.json": b'{"n": 0}', "s/1.txt": b"one"}
    write_tar(tmp_path / "a.tar", first)
    write_tar(tmp_path / "b.tar", {"0.jpg": encoded(1), "1.json": b"[]", "1.png": encoded(2)})
    for source in (tmp_path, tmp_path / "*.tar"):
        found = records(source, "{key}")
        assert [record.id for record in found] == ["a.tar/s/0", "a.tar/s/1", "b.tar/0", "b.tar/1"]
    assert records(tmp_path / "a.tar", "{image} {txt} {n}")[0].questions == ("s/0.png zero 0",)
    assert read_record(found[0]).size == (20, 20)
    assert read_record(found[2]).size == (23, 21)
    assert found[1].error == "image: there is no image beside s/1.txt"
    assert found[3].error == "INPUT: 1.json cannot be read (it holds no object)"


def test_a_damaged_tar_loses_only_itself(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "1.png": encoded(1)})
    write_tar(tmp_path / "b.tar", {"0.png": encoded(0)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:1600])  # in the second image
    found = records(tmp_path)
    assert [record.id for record in found if record.error is None] == ["a.tar/0", "b.tar/0"]
    [broken] = [record for record in found if record.error is not None]
    assert broken.id == "a.tar/"
    assert "is no tar or is damaged" in str(broken.error)


def test_a_key_that_comes_again_is_another_record(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.png", "1.png", "0.png"):
            member = tarfile.TarInfo(name)
            member.size = len(encoded())
            tar.addfile(member, io.BytesIO(encoded()))
    assert [r.id for r in records(tmp_path)] == ["a.tar/0", "a.tar/1", "a.tar/0#2"]


def test_templates() -> None:
    assert template_columns(literal("a {b} }")) == []
    assert template_columns("{a b} and {c.d}, {{e}}") == ["a b", "c.d"]
    for template in ("{", "{}", "{a!r}", "{a:>3}"):
        with pytest.raises(InputError, match=r"^template: .*write \{column\}"):
            template_columns(template)


@pytest.mark.parametrize(
    ("source", "template", "column", "message"),
    [
        ("nowhere", "", "image", r"^INPUT: there is no .*nowhere; give a folder"),
        ("*.tar", "", "image", r"^INPUT: there is no .*\.tar"),
        ("empty", "", "image", r"^INPUT: .*empty holds no image"),
        ("table.jsonl", "{x}", "image", r"^template: .* has no column 'x'; it has alt, image"),
        (
            "table.jsonl",
            "{alt}",
            "url",
            r"^image-column: .* has no column 'url'; it has alt, image",
        ),
        ("table.txt", "", "image", r"^INPUT: .*table\.txt is no table \(\.jsonl, "),
        ("lines.jsonl", "", "image", r"^INPUT: nothing in .*lines\.jsonl .*: this line is no JSON"),
        ("tars", "", "image", r"^INPUT: nothing in .*tars can be read.*: .*a\.tar is no tar or"),
        ("broken.parquet", "", "image", r"^INPUT: .*broken\.parquet is no Parquet file"),
        ("broken.csv", "", "image", r"^INPUT: .*broken\.csv, line 1: field larger than"),
    ],
)
def test_an_input_that_cannot_be_listed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    template: str,
    column: str,
    message: str,
) -> None:
    monkeypatch.setattr("xgenmm.captioning.datasets.CSV_FIELD_BYTES", 10)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.jsonl").write_text('{"image": "a.png", "alt": "a"}')
    (tmp_path / "table.txt").write_text("a.png")
    (tmp_path / "lines.jsonl").write_text("a.png\nb.png\n")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(b"PAR1")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "broken.csv").write_text("image\n" + "a" * 20)
    with pytest.raises(InputError, match=message):
        count_records(str(tmp_path / source), [template], column)


def test_addresses(tmp_path: Path, file_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    assert read_record(Record("0", "", f"{file_server}/a.png")).size == (20, 20)
    for address, message in (
        (f"{file_server}/b.png", r"^image: http.*/b\.png answers with HTTP 404"),
        ("http://127.0.0.1:9/", r"^image: cannot fetch http"),
        ("http://[", r"^image: cannot fetch http"),
    ):
        with pytest.raises(InputError, match=message):
            read_record(Record("0", "", address))
    assert MAX_DOWNLOAD > 1000
    monkeypatch.setattr("xgenmm.captioning.datasets.MAX_DOWNLOAD", 10)
    with pytest.raises(InputError, match="more than 10 bytes"):
        read_record(Record("0", "", f"{file_server}/a.png"))


# The program


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_every_row_is_what_the_engine_says_alone(
    tmp_path: Path, checkpoint: Path, engine: Engine, format_: str
) -> None:
    images = draw(tmp_path / "images", 9)
    output = tmp_path / f"out.{format_}"
    questions = ["What is it?", "Is it {red}?"]
    asked = [option for q in questions for option in ("--question", q)]
    assert caption(images, output, checkpoint, "--shard-rows", "4", *asked) == 0
    rows = rows_of(output)
    assert len(rows) == 18
    assert {path.suffix for path in output.glob("part-*")} == {f".{format_}"}
    assert len(list(output.glob("part-*"))) == 5  # records are not torn apart
    for row in rows:
        image = xgenmm.read_image(images / row["image"])
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS)
        made = engine.stream(Request(row["question"], [image], sampling=sampling))
        assert row["text"] == made.text()
        assert row["prompt_tokens"] == made.usage.prompt_tokens
        assert row["image_tokens"] == made.usage.image_tokens
        assert row["output_tokens"] == made.usage.output_tokens
        assert row["stop_reason"] == made.usage.stop_reason
        assert row["error"] is None


def test_a_bad_image_is_a_row_with_an_error(
    tmp_path: Path, checkpoint: Path, file_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.png").write_bytes(encoded())
    (tmp_path / "cut.png").write_bytes(encoded()[:60])
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    names = ["good.png", "cut.png", "text.png", "huge.png", "none\0.png", f"{file_server}/no.png"]
    table = tmp_path / "table.jsonl"
    lines = [{"image": name, "alt": "a"} for name in names]
    lines += [{"image": "good.png", "alt": "long " * 300}, {"image": "good.png", "alt": "\ud800"}]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    assert caption(table, tmp_path / "out", checkpoint, "--template", "Is it {alt}?") == 0
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [str(number) for number in range(9)]
    assert rows[0]["error"] is None
    assert rows[0]["text"]
    for row, error in zip(
        rows[1:],
        [
            "image: the PNG file is damaged",
            "image: the file is not an image",
            "image: the image has 9000 x 9000 pixels",
            "image: cannot read",
            f"image: {file_server}/no.png answers with HTTP 404",
            "question: with its images",
            "question: invalid Unicode",
            "INPUT: this line is no JSON",
        ],
        strict=True,
    ):
        assert row["error"].startswith(error)
        assert row["text"] is None
        assert row["output_tokens"] == 0
    shown = capsys.readouterr()
    assert "8 with an error" in shown.out
    assert "9/9" in shown.err


def test_a_second_run_does_what_is_missing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, output = draw(tmp_path / "images", 5), tmp_path / "out.jsonl"
    assert caption(images, output, checkpoint) == 0
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    (images / "0005.png").write_bytes(encoded(5))  # not the last in order
    (output / "_part-00001.jsonl.partial").write_text("half a row")
    assert caption(f"{images}/", output, checkpoint) == 0
    second = {path.name: path.read_bytes() for path in output.iterdir()}
    assert second.keys() - first.keys() == {"part-00001.jsonl"}
    assert first.items() <= second.items()
    assert [json.loads(second["part-00001.jsonl"])["id"]] == ["0005.png"]

    def never(*_: object) -> None:
        raise AssertionError("an engine for nothing to do")

    monkeypatch.setattr("xgenmm.captioning.pipeline.CaptionTask.load", never)
    assert caption(images, output, checkpoint) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == second


def test_other_settings_need_another_output(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = draw(tmp_path / "images", 1), tmp_path / "out"
    assert caption(images, output, checkpoint, "--dtype", "float17") == 1
    assert "dtype: 'float17' is not one of" in capsys.readouterr().err
    assert caption(images, output, checkpoint, "--question", "What?") == 0  # nothing was made
    other = shutil.copytree(checkpoint, tmp_path / "other")
    for source, model, options, message in (
        (images, checkpoint, ("--question", "Why?"), "made with questions ['What?'], not ['Why?"),
        (images, other, ("--question", "What?"), "was made with model"),
        (tmp_path, checkpoint, ("--question", "What?"), "was made with input"),
        (images, checkpoint, ("--question", "What?", "--top-k", "3"), "with top_k 0, not 3"),
        (images, checkpoint, ("--question", "What?", "--format", "jsonl"), "made with format"),
    ):
        capsys.readouterr()
        assert caption(source, output, model, *options) == 1
        assert message in capsys.readouterr().err
    assert len(rows_of(output)) == 1


def test_a_table_that_has_changed_needs_another_output(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "images", 2)
    table, output = tmp_path / "table.csv", tmp_path / "out"
    table.write_text("image\nimages/000.png\n")
    assert caption(table, output, checkpoint) == 0
    table.write_text("image\nimages/000.png\nimages/001.png\n")
    assert caption(table, output, checkpoint) == 0
    assert len(rows_of(output)) == 2
    table.write_text("image\nimages/001.png\n")
    assert caption(table, output, checkpoint) == 1
    assert "for row 0, which now is 'images/001.png'" in capsys.readouterr().err


def test_an_output_belongs_to_one_process_and_to_this_program(tmp_path: Path) -> None:
    with (
        open_shards(tmp_path / "out", "jsonl", 1, {}),
        pytest.raises(InputError, match=r"^OUTPUT: another process writes to"),
        open_shards(tmp_path / "out", "jsonl", 1, {}),
    ):
        pass
    file = tmp_path / "file"
    file.write_text("")
    wrong = ((tmp_path, "holds other files"), (file, "is a file"), (file / "out", "cannot be made"))
    for output, message in wrong:
        with pytest.raises(InputError, match=message), open_shards(output, "jsonl", 1, {}):
            pass


def test_rows_are_kept_when_something_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with open_shards(tmp_path / "out", "parquet", 100, {}) as shards:
            shards.add([Row("0", "a.png", "What?", "A \udcff.")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [row["text"] for row in rows_of(tmp_path / "out")] == ["A \\udcff."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "3"), "temperature: must be a number from 0.0 to 2.0, not 3.0"),
        (("--shard-rows", "0"), "shard-rows: must be at least 1, not 0"),
        (("--template", "{"), "template: "),
        (("--model", "nobody"), "model: 'nobody' is neither a folder"),
        (("--device", "abacus"), "device: 'abacus' is not one"),
    ],
)
def test_wrong_options(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    images = draw(tmp_path / "images", 1)
    assert caption(images, tmp_path / "out", checkpoint, *options) == 1
    assert message in capsys.readouterr().err


def test_the_program_waits_for_no_library_that_only_the_engine_needs() -> None:
    loaded = "import sys, xgenmm.captioning.program; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0
    assert set(QUANTIZE) == set(QUANTIZATIONS)


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_killed_at_random_moments_every_row_is_there_once(
    tmp_path: Path, checkpoint: Path, format_: str
) -> None:
    images, output = draw(tmp_path / "images", 100), tmp_path / f"out.{format_}"
    whole = tmp_path / f"whole.{format_}"
    options = ("--question", "What?", "--question", "Why?", "--shard-rows", "3")
    assert caption(images, whole, checkpoint, *options) == 0
    # A server of forks has loaded the program once; it has no threads, which a fork would lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rng = random.Random(5)

    def shards() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in output.glob("part-*")}

    kills = 0
    while True:
        before = shards()
        process = context.Process(target=exit_with, args=(images, output, checkpoint, *options))
        process.start()
        if kills < 8:
            goal = len(before) + rng.randrange(3)
            while process.is_alive() and len(shards()) < goal:
                process.join(0.001)
            process.join(rng.uniform(0, 0.02))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        assert before.items() <= shards().items()  # what was there stays as it was
        ids = [(row["id"], row["question"]) for row in rows_of(output)]
        assert len(ids) == len(set(ids))
        if process.exitcode == 0:
            break
        kills += 1
    assert kills >= 3
    assert key_sorted(rows_of(output)) == key_sorted(rows_of(whole))
    assert len(rows_of(output)) == 200


def exit_with(*arguments: Any) -> None:
    """Run the program; its status is the process's."""
    sys.exit(caption(*arguments))


def key_sorted(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(row) for row in rows)
