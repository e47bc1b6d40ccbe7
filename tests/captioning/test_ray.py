"""The stage as a Ray Data pipeline on a local cluster, whose processes are killed while it runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from scripts.local_server import ROOT
from tests.captioning.test_caption import NEW_TOKENS, caption, draw, key_sorted, rows_of
from tests.support import tiny
from xgenmm import InputError, SamplingParams
from xgenmm.captioning import pipeline as stages
from xgenmm.captioning.datasets import open_shards, read_records
from xgenmm.captioning.pipeline import CaptionTask, with_ray

QUESTION = "What is it?"


def cluster_processes(kind: str) -> list[psutil.Process]:
    """The cluster's processes at work on one part of the pipeline, by the title Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::") and kind in title:
            found.append(process)
    return found


def kill_one(kind: str, over: threading.Event) -> bool:
    """Kill the first such process that is seen; False if there is none until all is over."""
    while not over.is_set():
        for process in cluster_processes(kind):
            process.kill()
            return True
    return False


@pytest.mark.timeout(1500)
def test_actors_and_workers_and_the_program_may_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "tiny")
    images = draw(tmp_path / "images", 60)
    (images / "003.png").write_text("no image")
    alone, output = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    options = ("--question", QUESTION, "--shard-rows", "4")
    assert caption(images, alone, checkpoint, *options) == 0

    monkeypatch.setattr(stages, "BLOCK", 4)
    command = [sys.executable, "-m", "xgenmm.captioning.program", str(images), "-o", str(output)]
    command += ["--model", str(checkpoint), "--max-new-tokens", str(NEW_TOKENS), *options]
    program = subprocess.Popen([*command, "--ray", "local", "--actors", "1"], cwd=ROOT)
    while program.poll() is None and not list(output.glob("part-*")):
        try:
            program.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
    program.send_signal(signal.SIGKILL)
    program.wait()
    first = key_sorted(rows_of(output))
    assert first

    settings = json.loads((output / "_settings.json").read_text())
    task = CaptionTask(str(checkpoint), sampling=SamplingParams(max_new_tokens=NEW_TOKENS))
    over = threading.Event()
    with open_shards(output, "jsonl", 4, settings) as shards, ThreadPoolExecutor(1) as aside:
        missing = shards.missing(read_records(str(images), [QUESTION], "image"))
        reader = aside.submit(kill_one, "_read_block", over)
        actor = None
        try:
            for rows in with_ray(task, missing, "local", actors=2):
                shards.add(rows)
                actor = actor or kill_one("_EngineActor", over)
        finally:
            over.set()  # or the thread would be waited for without end
        assert (reader.result(), actor) == (True, True)
    assert key_sorted(rows_of(output)) == key_sorted(rows_of(alone))


def test_a_cluster_must_be_there_and_large_enough() -> None:
    task = CaptionTask("demo", device="cpu")
    assert stages._actors({"CPU": 3.0}, task, None) == (2, False)
    assert stages._actors({"CPU": 8.0, "GPU": 4.0}, CaptionTask("demo"), None) == (4, True)
    with pytest.raises(InputError, match=r"^actors: 3 do not fit: the cluster has 2 CPU cores"):
        stages._actors({"CPU": 3.0}, task, 3)
    with pytest.raises(InputError, match=r"^ray: no cluster at '127\.0\.0\.1:9'"):
        next(with_ray(task, [], "127.0.0.1:9"))


def test_what_is_no_cluster_is_named_soon(tmp_path: Path) -> None:
    draw(tmp_path / "images", 1)
    limits = ("gcs_rpc_server_connect_timeout_s", "py_gcs_connect_timeout_s")
    environment = os.environ | {f"RAY_{name}": "1" for name in limits}
    with socket.create_server(("127.0.0.1", 0)) as listening:  # it takes calls and never answers
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        command = [sys.executable, "-m", "xgenmm.captioning.program", str(tmp_path / "images")]
        command += ["-o", str(tmp_path / "out"), "--model", "demo", "--ray", address]
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=60)
    assert ended.returncode == 1
    assert f"ray: no cluster at '{address}' (" in ended.stderr.decode()
