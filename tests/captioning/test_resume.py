"""Resuming a run: missing rows are added once, and other settings are rejected."""

import json
import multiprocessing
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.captioning.dataset import caption, png, read_rows, sorted_json, write_images


def test_second_run_adds_only_missing_rows(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, output = write_images(tmp_path / "images", 5), tmp_path / "out.jsonl"
    assert caption(images, output, checkpoint) == 0
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    (images / "0005.png").write_bytes(png(5))  # sorts between the others
    (output / "_part-00001.jsonl.partial").write_text("half a row")
    assert caption(f"{images}/", output, checkpoint) == 0
    second = {path.name: path.read_bytes() for path in output.iterdir()}
    assert second.keys() - first.keys() == {"part-00001.jsonl"}
    assert first.items() <= second.items()
    assert [json.loads(second["part-00001.jsonl"])["id"]] == ["0005.png"]

    def refuse(*_: object) -> None:
        raise AssertionError("an engine was loaded although no row is missing")

    monkeypatch.setattr("xgenmm.captioning.pipeline.CaptionTask.load", refuse)
    assert caption(images, output, checkpoint) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == second


def test_other_settings_are_rejected(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = write_images(tmp_path / "images", 1), tmp_path / "out"
    assert caption(images, output, checkpoint, "--dtype", "float17") == 1
    assert "dtype: 'float17' is not one of" in capsys.readouterr().err
    assert caption(images, output, checkpoint, "--question", "What?") == 0  # no shard was written
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
    assert len(read_rows(output)) == 1


def test_changed_table_is_rejected(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", 2)
    table, output = tmp_path / "table.csv", tmp_path / "out"
    table.write_text("image\nimages/000.png\n")
    assert caption(table, output, checkpoint) == 0
    table.write_text("image\nimages/000.png\nimages/001.png\n")
    assert caption(table, output, checkpoint) == 0
    assert len(read_rows(output)) == 2
    table.write_text("image\nimages/001.png\n")
    assert caption(table, output, checkpoint) == 1
    error = capsys.readouterr().err
    assert "record 0 was 'images/000.png'" in error
    assert "is 'images/001.png' now" in error


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_every_row_is_written_once_when_runs_are_killed(
    tmp_path: Path, checkpoint: Path, format_: str
) -> None:
    images, output = write_images(tmp_path / "images", 100), tmp_path / f"out.{format_}"
    uninterrupted = tmp_path / f"uninterrupted.{format_}"
    options = ("--question", "What?", "--question", "Why?", "--shard-rows", "3")
    assert caption(images, uninterrupted, checkpoint, *options) == 0
    # The fork server imports everything once; it has no threads, which a fork would lose.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "xgenmm.engine.load"])
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
            while process.is_alive() and len(list(output.glob("part-*"))) < goal:
                process.join(0.001)
            process.join(rng.uniform(0, 0.02))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        assert before.items() <= shards().items()  # shards are never changed
        ids = [(row["id"], row["question"]) for row in read_rows(output)]
        assert len(ids) == len(set(ids))
        if process.exitcode == 0:
            break
        kills += 1
    assert kills >= 3
    assert sorted_json(read_rows(output)) == sorted_json(read_rows(uninterrupted))
    assert len(read_rows(output)) == 200


def exit_with(*arguments: Any) -> None:
    """Run the command; its status becomes that of the process."""
    sys.exit(caption(*arguments))
