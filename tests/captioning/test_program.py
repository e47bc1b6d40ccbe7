"""`xgenmm caption`: its rows, records that fail, and invalid options."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import xgenmm
from tests.captioning.dataset import NEW_TOKENS, caption, png, read_rows, write_images
from tests.support.odd_server import Connection, odd_server
from tests.support.paths import ROOT
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


@pytest.mark.alone
def test_ctrl_c_writes_the_answers_so_far(tmp_path: Path, checkpoint: Path) -> None:
    write_images(tmp_path / "images", 2)
    output = tmp_path / "out.jsonl"
    with odd_server() as server:
        server.answers["a"] = Connection.wait_closed
        sources = ["images/000.png", server.url("a"), "images/001.png", server.url("a")]
        table = tmp_path / "table.jsonl"
        table.write_text("".join(json.dumps({"image": source}) + "\n" for source in sources))
        command = [sys.executable, "-m", "xgenmm", "caption", str(table), "-o", str(output)]
        command += ["--model", str(checkpoint), "--max-new-tokens", str(NEW_TOKENS)]
        environment = os.environ | {"TQDM_MININTERVAL": "0"}  # show each row at once
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE
        ) as process:
            assert process.stderr is not None
            progress = b""
            while b" 2/4 " not in progress:
                character = process.stderr.read(1)
                assert character, progress
                progress += character
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            assert b"Traceback" not in process.stderr.read()
        assert [row["id"] for row in read_rows(output)] == ["0", "2"]
        server.answers["a"] = lambda connection: connection.send(b"HTTP/1.1 404 No\r\n\r\n")
        assert caption(table, output, checkpoint) == 0
    assert [row["id"] for row in read_rows(output)] == ["0", "1", "2", "3"]


def test_limits_of_downloads_are_options(
    tmp_path: Path, checkpoint: Path, file_server: str
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "table.csv").write_text(f"image\n{file_server}/a.png\n")
    for number, (option, error) in enumerate(
        [
            (("--download-bytes", "10"), "/a.png has more than 10 bytes"),
            (("--download-seconds", "1e-6"), "/a.png takes longer than 1e-06 s"),
            (
                ("--public-addresses-only",),
                "/a.png leads to 127.0.0.1, which has no public address",
            ),
        ]
    ):
        output = tmp_path / str(number)
        assert caption(tmp_path / "table.csv", output, checkpoint, *option) == 0
        assert read_rows(output)[0]["error"] == f"image: {file_server}{error}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "3"), "temperature: must be a number from 0.0 to 2.0, not 3.0"),
        (("--shard-rows", "0"), "shard-rows: must be at least 1, not 0"),
        (("--download-bytes", "0"), "download-bytes: must be at least 1, not 0"),
        (("--download-seconds", "nan"), "download-seconds: must be above 0, not nan"),
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
