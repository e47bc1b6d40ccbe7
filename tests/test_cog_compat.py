"""The workarounds for Cog, and whether Cog still needs them."""

import contextlib
import os
import shutil
from pathlib import Path

import httpx
import pytest

from cog_compat import LOST_SECONDS, SlotWatch, remove_old_folders
from tests.support.paths import ROOT
from tests.support.server import events, serving

SECONDS = 60.0
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
