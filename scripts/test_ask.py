"""The program behind `make predict`."""

from pathlib import Path

import pytest

from scripts.ask import EXAMPLES, ask
from scripts.local_server import LocalServer


def test_ask_prints_the_streamed_answer(
    server: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(server.url, EXAMPLES / "scene-8.png", "What color is the star?", "demo") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "answer    orange" in lines
    assert lines[-1].endswith(" tokens")


def test_ask_prints_the_error_of_a_failed_prediction(
    server: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(b"no image")
    assert ask(server.url, file, "What is it?", "demo") == 1
    assert "image: " in capsys.readouterr().err
