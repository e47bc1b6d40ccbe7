"""The program and those parts that measure the demo or a small model."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.benchmarks import host, http, image, peers, video
from scripts.benchmarks.__main__ import main
from scripts.benchmarks.report import Row
from scripts.local_server import LocalServer

SMALL = replace(
    image.MID_SIZE,
    vision=replace(image.MID_SIZE.vision, num_layers=1),
    resampler=replace(image.MID_SIZE.resampler, depth=1),
    decoder=replace(image.MID_SIZE.decoder, num_layers=1),
)


@pytest.mark.parametrize(
    ("part", "requests", "goals"),
    [
        ("host", 1, 7),
        ("http", 1, 1),
        ("peers", 2, 2),
        ("image", 1, 1),
        ("clip", 1, 1),
        ("video", 1, 2),
        ("choices", 7, 2),
        ("quantised", 1, 0),
    ],
)
def test_part_prints_and_writes_its_figures(
    part: str,
    requests: int,
    goals: int,
    server: LocalServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image, "MID_SIZE", SMALL)
    monkeypatch.setattr(peers, "MID_SIZE", SMALL)
    monkeypatch.setattr(host, "TOKENS", 40)
    monkeypatch.setattr(video, "FRAMES", 30)
    monkeypatch.setattr(http, "serving", lambda environment: nullcontext(server))
    file = tmp_path / "figures.json"
    small = ["--requests", str(requests), "--scenes", "4", "--rounds", "1", "--vllm", "absent"]
    status = main([part, *small, "--json", str(file)])
    figures = json.loads(file.read_text())
    met = [row["met"] for row in figures["rows"] if row["met"] is not None]
    assert len(met) == goals
    assert status == (0 if all(met) else 1)
    assert all(row["part"] == part and row["value"] > 0 for row in figures["rows"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == figures["machine"]
    assert len([line for line in printed if line.startswith(f"| {part} |")]) == len(figures["rows"])


def test_row_shows_whether_its_goal_is_met() -> None:
    row = Row("cpu", "decode, times as fast", 4.321, "x", at_least=4)
    assert str(row) == "| cpu | decode, times as fast | 4.32 x | ≥ 4 x | yes |"
    missed = Row("image", "second against first", 0.25, "x", at_most=0.2)
    assert str(missed) == "| image | second against first | 0.25 x | ≤ 0.2 x | **no** |"
    assert str(Row("http", "1 client", 1234.5, "tokens/s")) == (
        "| http | 1 client | 1,234 tokens/s |  |  |"
    )


def test_errors_say_which_part_or_option_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["speed"], ["http", "--golden", str(tmp_path)], ["golden"]):
        with pytest.raises(SystemExit):
            main(arguments)
    printed = capsys.readouterr().err
    assert "unknown part: speed; must be host, http," in printed
    assert f"golden: {tmp_path} has no folder with a model.safetensors in it" in printed
    assert "golden: give --golden FOLDER" in printed
