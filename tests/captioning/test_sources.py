"""Listing the records of INPUT: folders, tables, tar files, and inputs that cannot be listed."""

import csv
import re
import tarfile
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.captioning.dataset import png, records, write_images, write_table, write_tar
from xgenmm import InputError
from xgenmm.captioning.media import load_image
from xgenmm.captioning.sources import count_records


def test_folder_is_listed_recursively(tmp_path: Path) -> None:
    write_images(tmp_path / "b", 2)
    (tmp_path / "a.JPG").write_bytes(png())
    (tmp_path / "notes.txt").write_text("no image")
    listed = records(tmp_path, "What is in {image}?")
    assert [record.id for record in listed] == ["a.JPG", "b/000.png", "b/001.png"]
    assert listed[1].questions == ("What is in b/000.png?",)
    assert load_image(listed[2], None).size == (23, 21)


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
    assert load_image(listed[0], None).size == (20, 20)
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
    assert listed[2].error == "INPUT: this line is not a JSON object but a list"
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
    assert load_image(listed[0], None).size == (20, 20)
    assert load_image(listed[2], None).size == (23, 21)
    assert listed[1].error == "image: the sample of s/1.txt has no image"
    assert listed[3].error == "INPUT: 1.json is not a JSON object but a list"


def test_damaged_tar_does_not_affect_the_next(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1))])
    write_tar(tmp_path / "b.tar", [("0.png", png(0))])
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:1600])  # cut in the second image
    listed = records(tmp_path)
    assert [record.id for record in listed] == ["a.tar/0", "a.tar/1", "a.tar/", "b.tar/0"]
    assert "is damaged or not a tar file" in str(listed[2].error)
    with pytest.raises(InputError, match="damaged or cut short"):
        load_image(listed[1], None)
    # tarfile takes a damaged header that is not the first one for the end of the tar.
    (tmp_path / "a.tar").write_bytes(content[:1024] + b"x" * 512)
    assert [record.id for record in records(tmp_path)] == ["a.tar/0", "a.tar/", "b.tar/0"]


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["0.png", "1.png", "0.png"], ["0", "1", "0#2"]),
        (["a.png", "a#2.png", "a.png"], ["a", "a#2", "a#3"]),
        (["a.png", "a.png", "a#2.png"], ["a", "a#2", "a#2#2"]),
        (["/a.png", "a.png"], ["/a", "a"]),
        (["\udcff.png", "\\udcff.png"], ["\\udcff", "\\udcff#2"]),
    ],
)
def test_samples_of_a_tar_get_distinct_ids(
    tmp_path: Path, names: list[str], ids: list[str]
) -> None:
    write_tar(tmp_path / "a.tar", [(name, png()) for name in names])
    assert [record.id for record in records(tmp_path)] == [f"a.tar/{id_}" for id_ in ids]


def test_files_whose_names_escape_alike_get_distinct_ids(tmp_path: Path) -> None:
    for name in ("\udcff.png", "\\udcff.png"):
        (tmp_path / name).write_bytes(png())
    assert {record.id for record in records(tmp_path)} == {"\\udcff.png", "\\udcff.png#2"}


@pytest.mark.parametrize(
    ("name", "size", "kind", "message"),
    [
        ("0.json", 2**40, tarfile.REGTYPE, "INPUT: 0.json is longer than the"),
        ("0.txt", 2**40, tarfile.REGTYPE, "INPUT: 0.txt is longer than the"),
        ("0.txt", 100, tarfile.REGTYPE, "INPUT: 0.txt is cut short"),
        ("1.png", 0, tarfile.LNKTYPE, "image: 1.png is a link, sparse or not a file"),
        ("1.png", 0, tarfile.GNUTYPE_SPARSE, "image: 1.png is a link, sparse or not a file"),
        ("1.png", -512, tarfile.REGTYPE, "INPUT: .*a.tar is damaged .*a member of -512 bytes"),
        ("x", 2**40, tarfile.XHDTYPE, "INPUT: .*a.tar is damaged .*a header of 1099511627776"),
        ("x", 2**40, tarfile.GNUTYPE_LONGNAME, "INPUT: .*a.tar is damaged .*a header of 1099"),
    ],
)
def test_member_that_cannot_be_read_is_an_error(
    tmp_path: Path, name: str, size: int, kind: bytes, message: str
) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", png())])
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    image = (tmp_path / "a.tar").read_bytes()[:1024]
    (tmp_path / "a.tar").write_bytes(image + member.tobuf(tarfile.GNU_FORMAT))
    errors = [str(record.error) for record in records(tmp_path)]
    assert [error for error in errors if re.match(message, error)]


@pytest.mark.parametrize("name", ["t.jsonl", "t.tar"])
def test_json_that_is_nested_too_deeply_is_an_error(tmp_path: Path, name: str) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    if name == "t.tar":
        write_tar(tmp_path / name, [("0.png", png()), ("0.json", deep)])
    else:
        (tmp_path / name).write_bytes(b'{"image": "a.png"}\n' + deep)
    assert "is JSON that is nested too deeply" in str(records(tmp_path / name)[-1].error)


def test_line_that_is_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgenmm.captioning.tables.MAX_LINE_LENGTH", 30)
    line = '{"image": "a.png"}\n'
    (tmp_path / "t.jsonl").write_text(line + '{"image": "%s"}\n' % ("a" * 100) + line)
    listed = records(tmp_path / "t.jsonl")
    assert [record.error is None for record in listed] == [True, False, True]
    assert listed[1].error == "INPUT: this line has more than the 30 bytes allowed"


def test_parquet_cell_without_an_equal_in_python_affects_only_its_row(tmp_path: Path) -> None:
    microseconds = [0, 2**62, 0]  # the second is in the year 148,107
    times = pyarrow.array(microseconds).cast(pyarrow.timestamp("us", "UTC"))
    columns = {"image": ["a.png", "b.png", "c.png"], "time": times, "bytes": [[b"\xff"]] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert [record.error for record in records(tmp_path / "t.parquet")] == [None] * 3
    listed = records(tmp_path / "t.parquet", "{time}")
    assert [record.id for record in listed if record.error is None] == ["0", "2"]
    assert str(listed[1].error).startswith(
        "INPUT: cannot read the timestamp[us, tz=UTC] in column 'time' of this row ("
    )
    assert records(tmp_path / "t.parquet", "{bytes}")[0].questions == ("[\"b'\\\\xff'\"]",)


def test_unknown_time_zone_in_parquet_matters_only_where_it_is_used(tmp_path: Path) -> None:
    times = pyarrow.array([0]).cast(pyarrow.timestamp("us", "Mars/Olympus"))
    table = pyarrow.table({"image": ["a.png"], "time": times})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert records(tmp_path / "t.parquet")[0].error is None
    assert "Mars/Olympus" in str(records(tmp_path / "t.parquet", "{time}")[0].error)


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
        ("long.csv", "", "image", r"^INPUT: .*long\.csv, line 1: the line after it has more"),
        ("no.parquet", "", "image", r"^image-column: .* has no column 'image'; it has a, b$"),
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
    monkeypatch.setattr("xgenmm.captioning.tables.MAX_LINE_LENGTH", 100)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.jsonl").write_text('{"image": "a.png", "alt": "a"}')
    (tmp_path / "table.txt").write_text("a.png")
    (tmp_path / "lines.jsonl").write_text("a.png\nb.png\n")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(b"PAR1")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "broken.csv").write_text('image\n"' + ("a" * 60 + "\n") * 2)
    (tmp_path / "long.csv").write_text("image\n" + "a," * 60)
    write_table(tmp_path / "no.parquet", [{"a": "x", "b": "y"}])
    with pytest.raises(InputError, match=message):
        count_records(str(tmp_path / source), [template], column)
