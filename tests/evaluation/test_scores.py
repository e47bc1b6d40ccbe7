"""`xgenmm scores` fills the published tables from lmms-eval's files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from xgenmm.__main__ import main
from xgenmm.evaluation.scores import scores

INTERLEAVE = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"


def write(folder: Path, results: dict[str, Any], date: str = "1", **options: Any) -> Path:
    """Write a file of results as lmms-eval does."""
    limit = options.pop("limit", None)
    arguments = {"pretrained": INTERLEAVE} | options
    model_args = ",".join(f"{name}={value}" for name, value in arguments.items())
    content = {"results": results, "config": {"model_args": model_args, "limit": limit}}
    folder.mkdir(exist_ok=True)
    path = folder / f"{date}_results.json"
    path.write_text(json.dumps(content))
    return path


def row(text: str, benchmark: str) -> list[list[str]]:
    """The cells of a benchmark in each table that has it."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line[:1] == "|"]
    lines = [[cell.strip() for cell in line] for line in lines]
    return [line for line in lines if re.sub(r" \(\d\)$", "", line[0]) == benchmark]


def test_results_of_several_models_fill_their_columns(tmp_path: Path) -> None:
    write(tmp_path, {"mme": {"mme_perception_score,none": 1450.0, "mme_cognition_score,none": 350}})
    write(tmp_path / "b", {"pope": {"alias": "pope", "pope_f1_score,none": 0.861}}, "2")
    base = {"textvqa_val": {"exact_match,none": 0.4642}}
    single = write(
        tmp_path / "c", base, pretrained="models/xgen-mm-phi3-mini-base-r-v1/", fewshot=4
    )
    text = scores([tmp_path / "b", single, tmp_path])
    assert row(text, "MME norm")[0][-3:] == ["64.4", "64.3", "-0.1"]
    assert row(text, "POPE")[1][-6:] == ["87.0", "", "", "87.0", "86.1", "-0.9"]
    assert row(text, "TextVQA")[0][-9:] == ["36.0", "", "", "46.1", "46.4", "+0.3", "46.4", "", ""]
    assert row(text, "MME")[0][-3:] == ["1827", "", ""]


def test_newest_whole_result_counts(tmp_path: Path) -> None:
    for folder, date, value in (("a", "2", 0.5), ("b", "1", 0.7)):
        write(
            tmp_path / folder,
            {"ai2d": {"exact_match,flexible-extract": value}},
            date,
            pretrained="xgen-mm-phi3-mini-instruct-r-v1",
        )
    part = {"ai2d": {"exact_match,flexible-extract": 1.0}}
    write(tmp_path / "c", part, "3", limit=8, pretrained="xgen-mm-phi3-mini-instruct-r-v1")
    assert row(scores([tmp_path]), "AI2D")[0][-2:] == ["50.0", "-25.8"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "not a file of lmms-eval's results"),
        ('{"results": {}}', "not a file of lmms-eval's results (KeyError('config'))"),
        (None, "pope_f1_score of pope must be a number, but is missing"),
        ("N/A", "pope_f1_score of pope must be a number, but is N/A"),
    ],
)
def test_errors_name_the_file(
    tmp_path: Path, text: str | None, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"pope": {} if text is None else {"pope_f1_score,none": text}})
    if text is not None and text[0] == "{":
        path.write_text(text)
    assert main(["scores", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert str(path) in said
    assert error in said


def test_folder_without_results_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scores", str(tmp_path)]) == 1
    assert f"error: {tmp_path}: no file *_results.json" in capsys.readouterr().err


def test_documentation_has_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scores"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "evaluation.md").read_text()
