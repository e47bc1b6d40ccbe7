"""The server when its worker dies: clients get an error, and a new server answers."""

import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.client import ENDLESS, SECONDS, answer, ask, streamed, until_output
from tests.support.paths import ROOT
from tests.support.server import LocalServer, serving

CLIENTS = 8


def worker(server: LocalServer) -> psutil.Process:
    """The worker of a server that is ready."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = (process for process in processes if "_run_worker" in " ".join(process.cmdline()))
    return found


def test_new_server_answers_after_the_worker_is_killed_under_load(endless: Path) -> None:
    with serving({"XGENMM_MODEL": str(endless)}) as server, contextlib.ExitStack() as responses:
        server.wait_ready(SECONDS)
        before = ask(server, question="Talk.", max_new_tokens=3)
        streams = [
            until_output(responses.enter_context(streamed(server, f"stream-{number}", **ENDLESS)))
            for number in range(CLIENTS)
        ]
        old = worker(server)
        old.kill()
        for stream in streams:
            with contextlib.suppress(httpx.TransportError):
                last = list(stream)[-1]
                assert (last.name, last.data["status"]) == ("completed", "failed")
        server.wait_ready(SECONDS)
        assert worker(server) != old
        after = ask(server, question="Talk.", max_new_tokens=3)
        assert answer(after) == answer(before)


@pytest.mark.parametrize(("dismissed", "status"), [(False, -signal.SIGKILL), (True, None)])
def test_watchdog_kills_a_server_that_does_not_end_by_itself(
    dismissed: bool, status: int | None
) -> None:
    with subprocess.Popen(["sleep", str(SECONDS)]) as server:
        watchdog = [sys.executable, str(ROOT / "serving" / "watchdog.py"), str(server.pid)]
        subprocess.run(watchdog, input=b"-" if dismissed else b"", check=True, timeout=SECONDS)
        assert server.poll() == status
        server.kill()


@pytest.fixture
def serve(tmp_path: Path) -> tuple[Path, Path]:
    """A copy of scripts/serve, and the folder of the programs it finds first."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    shutil.copy2(ROOT / "scripts" / "serve", tmp_path / "scripts")
    shutil.copy2(ROOT / "openapi.json", tmp_path)
    return tmp_path / "scripts" / "serve", programs


def write_program(path: Path, commands: str) -> None:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("death", "starts", "status"),
    [("kill -KILL $$", 6, 128 + signal.SIGKILL), ("exit 0", 6, 0), ("exit 1", 1, 1)],
    ids=["killed", "POST /shutdown", "port in use"],
)
def test_serve_gives_up_when_each_new_server_ends_soon(
    serve: tuple[Path, Path], death: str, starts: int, status: int
) -> None:
    program, programs = serve
    log = programs / "log"
    write_program(programs / "python", f"echo started >> {log}\n{death}")
    write_program(programs / "sleep", f"echo slept $1 >> {log}")
    done = subprocess.run([program], stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    assert done.returncode == status
    lines = log.read_text().splitlines()
    assert lines.count("started") == starts
    slept = [line for line in lines if line.startswith("slept")]
    assert slept == [f"slept {seconds}" for seconds in (0, 1, 2, 4, 8)][: starts - 1]
    assert ("giving up" in done.stderr) == (starts > 1)
