"""The data set that teaches the demo Italian, and its evaluation."""

import json
import random
from pathlib import Path

import pytest

from scripts.demo_finetune.dataset import Mix, write_dataset
from scripts.demo_finetune.evaluate import evaluate, italian_groups
from scripts.demo_finetune.italian import IN_ITALIAN, ITALIAN, italian_questions
from scripts.demo_model.checkpoint import DEMO
from scripts.demo_model.fonts import held_out_fonts
from scripts.demo_model.sampling import sample_scene
from scripts.demo_model.scene import COLORS, KINDS
from xgenmm.__main__ import main

FEW = Mix(images=8, pairs=2)


def test_dataset_is_reproducible_and_passes_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        write_dataset(tmp_path / name, FEW)
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    records = [json.loads(line) for line in files["data.jsonl"].splitlines()]
    shown = {image for record in records for image in record["images"]}
    assert shown == files.keys() - {"data.jsonl"}
    assert len(shown) == FEW.images + 2 * FEW.pairs

    assert main(["finetune", "demo", str(tmp_path / "first" / "data.jsonl"), "--check"]) == 0
    assert f"{len(records)} samples, 0 faults" in capsys.readouterr().out


def test_questions_are_answered_in_italian() -> None:
    assert ITALIAN.keys() == {*COLORS, *KINDS}
    rng = random.Random(1)
    scene = sample_scene(rng, held_out_fonts(), level=1.0)
    for qa in italian_questions(scene, rng, 3):
        assert qa.kind in ("color", "shape")
        assert qa.question.endswith(IN_ITALIAN.format(""))
        assert qa.answer in ITALIAN.values()


def test_held_out_questions_are_not_those_of_the_data_set(tmp_path: Path) -> None:
    write_dataset(tmp_path, FEW)
    images = {path.read_bytes() for path in tmp_path.glob("*.png")}
    for number, group in enumerate(italian_groups(8)):
        group[0].images[0].save(path := tmp_path / f"held-out-{number}.png")
        assert path.read_bytes() not in images


def test_adapter_of_the_repository_answers_in_italian(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(DEMO / "adapters" / "italian", 6)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "**all**" in line]
    (_, asked, before, after), (_, _, _, old) = rows
    assert int(asked) > 10
    assert before == "0.0%"
    assert float(after.rstrip("% |")) > 80
    assert float(old.rstrip("% |")) > 80
