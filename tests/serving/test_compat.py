"""The workarounds for Cog, and whether Cog still needs them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from serving.compat import LOST_SECONDS, SlotWatch, remove_old_folders, temporary_folder
from tests.support.paths import ROOT
from tests.support.server import events, serving

SECONDS = 60.0
TETHER = ROOT / "serving" / "tether.py"
ASYNC_GENERATOR = """
import asyncio
from cog import AsyncConcatenateIterator, BasePredictor, streaming

class Predictor(BasePredictor):
    @streaming
    async def predict(self) -> AsyncConcatenateIterator[str]:
        yield "one"
        await asyncio.to_thread(open("pipe").read)
"""


def test_cog_still_withholds_what_an_async_generator_yields(tmp_path: Path) -> None:
    """If this fails, Cog streams async generators: make `predict` one and remove the workaround."""
    (tmp_path / "predict.py").write_text(ASYNC_GENERATOR)
    (tmp_path / "scripts").mkdir()
    shutil.copy2(ROOT / "scripts" / "serve", tmp_path / "scripts")
    shutil.copy2(ROOT / "openapi.json", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with serving({}, root=tmp_path) as server:
        server.wait_ready(SECONDS)
        received = []
        with (
            httpx.stream(
                "POST",
                f"{server.url}/predictions",
                headers={"Accept": "text/event-stream"},
                timeout=httpx.Timeout(SECONDS, read=2),
            ) as response,
            (tmp_path / "pipe").open("w"),  # returns once the generator has yielded
            contextlib.suppress(httpx.ReadTimeout),
        ):
            for event in events(response):
                received.append(event.name)
        assert received == ["start"]


def test_slots_are_lost_if_the_server_is_full_without_work() -> None:
    watch = SlotWatch(slots=16)
    assert not watch.lost("BUSY", 8, now=0)
    assert not watch.lost("BUSY", 0, now=LOST_SECONDS - 1)
    assert watch.lost("BUSY", 8, now=LOST_SECONDS)


@pytest.mark.parametrize(("status", "running"), [("BUSY", 9), ("READY", 0), (None, 0)])
def test_slots_are_not_lost_if_the_server_works_or_has_free_ones(
    status: str | None, running: int
) -> None:
    watch = SlotWatch(slots=16)
    assert not watch.lost("BUSY", 0, now=0)
    assert not watch.lost(status, running, now=LOST_SECONDS)
    assert not watch.lost("BUSY", 0, now=LOST_SECONDS + 1)


def test_temporary_folder_replaces_those_of_killed_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with subprocess.Popen(["true"]) as ended:
        pass
    names = (f"a-{ended.pid}-x", f"a-{os.getpid()}-x", f"a-{os.getppid()}-x", f"b-{ended.pid}-x")
    for name in names:
        (tmp_path / f"xgenmm-{name}" / "file").mkdir(parents=True)
    made = temporary_folder("a")
    kept = {tmp_path / f"xgenmm-{name}" for name in names[2:]}
    assert set(tmp_path.iterdir()) == {made, *kept}


def test_tether_ends_its_command_when_its_input_closes() -> None:
    command = [sys.executable, str(TETHER), "sh", "-c", "echo $$; exec sleep 60"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tether:
        assert tether.stdin is not None
        assert tether.stdout is not None
        child = int(tether.stdout.readline())
        tether.stdin.close()
        assert tether.wait(SECONDS) == 128 + signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_tether_ends_with_the_status_of_its_command() -> None:
    command = [sys.executable, str(TETHER), "sh", "-c", "exit 3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as tether:
        assert tether.wait(SECONDS) == 3


def test_old_folders_are_removed_but_no_other_files(tmp_path: Path) -> None:
    for name in ("ended", "killed", "other", "an/id/with slashes"):
        for part in ("inputs", "outputs"):
            (tmp_path / name / part).mkdir(parents=True)
    (tmp_path / "killed" / "inputs" / "spill_1.json").touch()
    (tmp_path / "other" / "outputs" / "0.png").touch()
    remove_old_folders(tmp_path, age=1000)
    assert len(list(tmp_path.iterdir())) == 4
    remove_old_folders(tmp_path, age=-1)
    assert list(tmp_path.rglob("*.*")) == [tmp_path / "other" / "outputs" / "0.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
