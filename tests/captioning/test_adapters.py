"""`xgenmm caption --adapter`: the answers of the merged checkpoint, in process and on Ray."""

import os
from pathlib import Path

import pytest

import xgenmm
from tests.captioning.dataset import caption, read_rows, sorted_json, write_images
from tests.support import adapters
from xgenmm import Request, SamplingParams
from xgenmm.__main__ import main

IMAGES = 5


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Path:
    return adapters.write(checkpoint.parent / "adapter", checkpoint)


def test_rows_equal_those_of_the_merged_checkpoint(
    tmp_path: Path, checkpoint: Path, adapter: Path
) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", str(checkpoint), str(adapter), "-o", str(merged)]) == 0
    images = write_images(tmp_path / "images", IMAGES)
    tar = adapters.pack(tmp_path / "adapter.tar.gz", adapter, mode="w:gz")
    assert caption(images, tmp_path / "plain.jsonl", checkpoint) == 0
    assert caption(images, tmp_path / "expected.jsonl", merged) == 0
    assert caption(images, tmp_path / "folder.jsonl", checkpoint, "--adapter", str(adapter)) == 0
    options = ("--adapter", os.path.relpath(tar), "--ray", "local", "--actors", "1")
    assert caption(images, tmp_path / "ray.jsonl", checkpoint, *options) == 0
    plain, expected, folder, ray = (
        sorted_json(read_rows(tmp_path / f"{name}.jsonl"))
        for name in ("plain", "expected", "folder", "ray")
    )
    assert len(expected) == IMAGES
    assert folder == ray == expected != plain


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_engine_answers_like_the_merged_checkpoint(
    tmp_path: Path, checkpoint: Path, adapter: Path, quantize: str | None
) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", str(checkpoint), str(adapter), "-o", str(merged)]) == 0
    request = Request("What is it?", sampling=SamplingParams(max_new_tokens=20))
    plain, found, expected = (
        xgenmm.load(folder, quantize=quantize, adapter=trained).stream(request).text()
        for folder, trained in ((checkpoint, None), (checkpoint, adapter), (merged, None))
    )
    assert found == expected != plain


def test_run_is_continued_with_the_same_adapter_only(
    tmp_path: Path, checkpoint: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = write_images(tmp_path / "images", 1), tmp_path / "out"
    mine = tmp_path / "mine"
    for scale, continued in ((1.0, True), (1.0, True), (0.5, False)):  # trained again
        adapters.write(mine, checkpoint, adapters.tensors(checkpoint, scale))
        assert caption(images, output, checkpoint, "--adapter", str(mine)) == (not continued)
    assert "was made with adapter" in capsys.readouterr().err
    assert caption(images, output, checkpoint) == 1
    assert "was made with adapter" in capsys.readouterr().err
    assert caption(images, output, checkpoint, "--adapter", str(images)) == 1
    assert "images is not an adapter" in capsys.readouterr().err
