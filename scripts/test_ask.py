"""The program behind `make predict`."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from scripts.ask import EXAMPLES, ask
from scripts.local_server import LocalServer
from tests.support.clips import clip


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


class EndsEarly(BaseHTTPRequestHandler):
    """A server that stops in the middle of an answer."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b'event: output\ndata: {"chunk": "yellow"}\n\n')

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def test_ask_reports_an_answer_that_ends_early(capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), EndsEarly) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert ask(url, EXAMPLES / "scene-8.png", "What is it?", "demo") == 1
        thread.join()
    captured = capsys.readouterr()
    assert "answer    yellow\n" in captured.out
    assert "the server ended the answer early" in captured.err


def test_ask_sends_a_video(
    server: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(clip(count=2))
    assert ask(server.url, file, "What color is it?", "demo", "video") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("video     ")
    assert lines[-1].endswith(" tokens")
