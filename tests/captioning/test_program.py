"""`xgenmm caption`: its rows, records that fail, and invalid options."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import xgenmm
from tests.captioning.dataset import NEW_TOKENS, caption, png, read_rows, write_images
from xgenmm import Engine, Request, SamplingParams
from xgenmm.captioning import program
from xgenmm.models import quantization


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return xgenmm.load(checkpoint)


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_rows_equal_answers_to_single_requests(
    tmp_path: Path, checkpoint: Path, engine: Engine, format_: str
) -> None:
    images = write_images(tmp_path / "images", 9)
    output = tmp_path / f"out.{format_}"
    questions = ["What is it?", "Is it {red}?"]
    options = [option for question in questions for option in ("--question", question)]
    assert caption(images, output, checkpoint, "--shard-rows", "4", *options) == 0
    rows = read_rows(output)
    assert len(rows) == 18
    assert {path.suffix for path in output.glob("part-*")} == {f".{format_}"}
    assert len(list(output.glob("part-*"))) == 5  # the rows of a record stay in one shard
    for row in rows:
        image = xgenmm.read_image(images / row["image"])
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS)
        answer = engine.stream(Request(row["question"], [image], sampling=sampling))
        assert row["text"] == answer.text()
        assert row["prompt_tokens"] == answer.usage.prompt_tokens
        assert row["image_tokens"] == answer.usage.image_tokens
        assert row["output_tokens"] == answer.usage.output_tokens
        assert row["stop_reason"] == answer.usage.stop_reason
        assert row["error"] is None


def test_record_that_fails_gets_a_row_with_its_error(
    tmp_path: Path, checkpoint: Path, file_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:60])
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    names = ["good.png", "cut.png", "text.png", "huge.png", "none\0.png", f"{file_server}/no.png"]
    table = tmp_path / "table.jsonl"
    lines = [{"image": name, "alt": "a"} for name in names]
    lines += [{"image": "good.png", "alt": "long " * 300}, {"image": "good.png", "alt": "\ud800"}]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    assert caption(table, tmp_path / "out", checkpoint, "--template", "Is it {alt}?") == 0
    rows = read_rows(tmp_path / "out")
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
            f"image: {file_server}/no.png returned HTTP 404",
            "question: with its images",
            "question: invalid Unicode",
            "INPUT: this line is not valid JSON",
        ],
        strict=True,
    ):
        assert row["error"].startswith(error)
        assert row["text"] is None
        assert row["output_tokens"] == 0
    printed = capsys.readouterr()
    assert "8 with an error" in printed.out
    assert "9/9" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "3"), "temperature: must be a number from 0.0 to 2.0, not 3.0"),
        (("--shard-rows", "0"), "shard-rows: must be at least 1, not 0"),
        (("--template", "{"), "template: "),
        (("--model", "nobody"), "model: 'nobody' is neither a folder"),
        (("--device", "abacus"), "device: 'abacus' is not a device"),
    ],
)
def test_invalid_option_is_rejected(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    images = write_images(tmp_path / "images", 1)
    assert caption(images, tmp_path / "out", checkpoint, *options) == 1
    assert message in capsys.readouterr().err


def test_program_does_not_import_torch() -> None:
    code = "import sys, xgenmm.captioning.program; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    # The program repeats these names because it cannot import them without torch.
    assert set(program.QUANTIZATIONS) == set(quantization.QUANTIZATIONS)


def test_help_shows_an_example() -> None:
    command = [sys.executable, "-m", "xgenmm", "caption", "--help"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "xgenmm caption photos -o captions" in printed
