"""Listing the records of INPUT: folders, tables, tar files, and inputs that cannot be listed."""

import csv
from functools import partial
from pathlib import Path

import pytest

from tests.captioning.dataset import png, records, write_images, write_table, write_tar
from xgenmm import InputError
from xgenmm.captioning.images import load_image
from xgenmm.captioning.sources import count_records


def test_folder_is_listed_recursively(tmp_path: Path) -> None:
    write_images(tmp_path / "b", 2)
    (tmp_path / "a.JPG").write_bytes(png())
    (tmp_path / "notes.txt").write_text("no image")
    listed = records(tmp_path, "What is in {image}?")
    assert [record.id for record in listed] == ["a.JPG", "b/000.png", "b/001.png"]
    assert listed[1].questions == ("What is in b/000.png?",)
    assert load_image(listed[2]).size == (23, 21)


@pytest.mark.parametrize("name", ["table.jsonl", "table.csv", "table.parquet"])
def test_table_rows_are_listed(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "images", 2)
    rows = [
        {"file": "images/000.png", "alt": 'a "red" thing,\nor {so}'},
        {"file": "http://127.0.0.1:9/x.png", "alt": ""},
        {"file": "", "alt": "nothing"},
    ]
    write_table(tmp_path / name, rows)
    listed = records(tmp_path / name, "Is it {alt}?", "Why?", column="file")
    assert [record.id for record in listed] == ["0", "1", "2"]
    assert listed[0].questions == ('Is it a "red" thing,\nor {so}?', "Why?")
    assert load_image(listed[0]).size == (20, 20)
    assert listed[1].source == listed[1].image == "http://127.0.0.1:9/x.png"
    assert listed[2].error == "image: this row has no path or URL in column 'file'"
    assert count_records(str(tmp_path / name), ["{alt}"], "file") == 3


def test_invalid_utf8_in_a_csv_affects_only_its_row(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbfimage\n\xff.png\nb.png,more\n")
    assert [record.image for record in records(tmp_path / "table.csv")] == ["\\xff.png", "b.png"]


def test_json_lines_may_have_different_columns(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text(
        '{"image": "a.png", "tags": ["x", 1], "n": null}\nnot JSON\n[]\n{"image": 3}\n'
    )
    listed = records(table, "{tags}{n}")
    assert listed[0].questions == ('["x", 1]',)
    assert listed[1].error is not None
    assert listed[1].error.startswith("INPUT: this line is not valid JSON (")
    assert listed[2].error == "INPUT: this line is not a JSON object"
    assert listed[3].error == "image: this row has no path or URL in column 'image'"
    assert listed[3].questions == ("{tags}{n}",)
    assert count_records(str(table), ["{tags}{n}"], "image") == 4
    table.write_text('{"image": "a.png", "tags": "x"}\n{"image": "b.png"}')
    assert records(table, "{tags}")[1].error == "template: this row has no column 'tags'"


def test_tar_samples_are_listed(tmp_path: Path) -> None:
    members = {"s/0.png": png(0), "s/0.txt": b"zero", "s/0.json": b'{"n": 0}', "s/1.txt": b"one"}
    write_tar(tmp_path / "a.tar", members.items())
    members = {"0.jpg": png(1), "1.json": b"[]", "1.png": png(2)}
    write_tar(tmp_path / "b.tar", members.items())
    for source in (tmp_path, tmp_path / "*.tar"):
        listed = records(source, "{key}")
        assert [record.id for record in listed] == ["a.tar/s/0", "a.tar/s/1", "b.tar/0", "b.tar/1"]
    assert records(tmp_path / "a.tar", "{image} {txt} {n}")[0].questions == ("s/0.png zero 0",)
    assert load_image(listed[0]).size == (20, 20)
    assert load_image(listed[2]).size == (23, 21)
    assert listed[1].error == "image: the sample of s/1.txt has no image"
    assert listed[3].error == "INPUT: cannot read 1.json (it must contain a JSON object, not list)"


def test_damaged_tar_does_not_affect_the_next(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1))])
    write_tar(tmp_path / "b.tar", [("0.png", png(0))])
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:1600])  # cut in the second image
    listed = records(tmp_path)
    assert [record.id for record in listed if record.error is None] == ["a.tar/0", "b.tar/0"]
    [broken] = [record for record in listed if record.error is not None]
    assert broken.id == "a.tar/"
    assert "is damaged or not a tar file" in str(broken.error)


def test_repeated_keys_of_a_tar_get_distinct_ids(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(name, png()) for name in ("0.png", "1.png", "0.png")])
    assert [r.id for r in records(tmp_path)] == ["a.tar/0", "a.tar/1", "a.tar/0#2"]


@pytest.mark.parametrize(
    ("source", "template", "column", "message"),
    [
        ("nowhere", "", "image", r"^INPUT: .*nowhere does not exist; give a folder"),
        ("*.tar", "", "image", r"^INPUT: .*\.tar does not exist"),
        ("empty", "", "image", r"^INPUT: .*empty contains no images"),
        ("table.jsonl", "{x}", "image", r"^template: .* has no column 'x'; it has alt, image"),
        (
            "table.jsonl",
            "{alt}",
            "url",
            r"^image-column: .* has no column 'url'; it has alt, image",
        ),
        ("table.txt", "", "image", r"^INPUT: .*table\.txt is not a table \(\.jsonl, "),
        (
            "lines.jsonl",
            "",
            "image",
            r"^INPUT: no row of .*lines\.jsonl .*: this line is not valid JSON",
        ),
        ("tars", "", "image", r"^INPUT: no row of .*tars can be read.*: .*a\.tar is damaged or"),
        ("broken.parquet", "", "image", r"^INPUT: .*broken\.parquet is damaged or not a Parquet"),
        ("broken.csv", "", "image", r"^INPUT: .*broken\.csv, line 1: field larger than"),
    ],
)
def test_input_that_cannot_be_listed_is_rejected(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    template: str,
    column: str,
    message: str,
) -> None:
    request.addfinalizer(partial(csv.field_size_limit, csv.field_size_limit()))
    monkeypatch.setattr("xgenmm.captioning.tables.MAX_CSV_FIELD_CHARS", 10)
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
