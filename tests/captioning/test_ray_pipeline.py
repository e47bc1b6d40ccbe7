"""Captioning on a local Ray cluster whose processes are killed, and clusters that do not fit."""

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

from tests.captioning.dataset import NEW_TOKENS, caption, read_rows, sorted_json, write_images
from tests.support.paths import ROOT
from xgenmm import InputError, SamplingParams
from xgenmm.captioning import ray_pipeline
from xgenmm.captioning.pipeline import CaptionTask
from xgenmm.captioning.ray_pipeline import caption_with_ray, choose_actors
from xgenmm.captioning.shards import SETTINGS_FILE, open_shards
from xgenmm.captioning.sources import read_records

QUESTION = "What is it?"


def cluster_processes(function: str) -> list[psutil.Process]:
    """The cluster's processes that run `function`, found by the process title that Ray sets."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::") and function in title:
            processes.append(process)
    return processes


def kill_one(function: str, stopped: threading.Event) -> bool:
    """Kill the first process found running `function`; False if `stopped` is set before that."""
    while not stopped.is_set():
        for process in cluster_processes(function):
            process.kill()
            return True
    return False


@pytest.mark.timeout(1500)
def test_rows_are_complete_when_processes_are_killed(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "images", 60)
    (images / "003.png").write_text("no image")
    in_process, output = tmp_path / "in_process.jsonl", tmp_path / "out.jsonl"
    options = ("--question", QUESTION, "--shard-rows", "4")
    assert caption(images, in_process, checkpoint, *options) == 0

    monkeypatch.setattr(ray_pipeline, "RECORDS_PER_BLOCK", 4)
    command = [sys.executable, "-m", "xgenmm", "caption", str(images), "-o", str(output)]
    command += ["--model", str(checkpoint), "--max-new-tokens", str(NEW_TOKENS), *options]
    program = subprocess.Popen([*command, "--ray", "local", "--actors", "1"], cwd=ROOT)
    while program.poll() is None and not list(output.glob("part-*")):
        try:
            program.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
    program.send_signal(signal.SIGKILL)
    program.wait()
    first = sorted_json(read_rows(output))
    assert first

    settings = json.loads((output / SETTINGS_FILE).read_text())
    task = CaptionTask(str(checkpoint), sampling=SamplingParams(max_new_tokens=NEW_TOKENS))
    stopped = threading.Event()
    with open_shards(output, "jsonl", 4, settings) as shards, ThreadPoolExecutor(1) as pool:
        pending = shards.pending(read_records(str(images), [QUESTION], "image"))
        task_killed = pool.submit(kill_one, "preprocess_block", stopped)
        actor_killed = False
        try:
            for rows in caption_with_ray(task, pending, "local", num_actors=2):
                shards.add(rows)
                actor_killed = actor_killed or kill_one("CaptionActor", stopped)
        finally:
            stopped.set()  # otherwise the pool would wait for its thread forever
        assert (task_killed.result(), actor_killed) == (True, True)
    assert sorted_json(read_rows(output)) == sorted_json(read_rows(in_process))


def test_missing_or_too_small_cluster_is_rejected() -> None:
    task = CaptionTask("demo", device="cpu")
    assert choose_actors({"CPU": 3.0}, task, None) == (2, False)
    assert choose_actors({"CPU": 8.0, "GPU": 4.0}, CaptionTask("demo"), None) == (4, True)
    with pytest.raises(InputError, match=r"^actors: 3 do not fit: the cluster has 2 CPU cores"):
        choose_actors({"CPU": 3.0}, task, 3)
    with pytest.raises(InputError, match=r"^ray: no cluster at '127\.0\.0\.1:9'"):
        next(caption_with_ray(task, [], "127.0.0.1:9"))


def test_cluster_address_that_never_answers_fails_quickly(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    limits = ("gcs_rpc_server_connect_timeout_s", "py_gcs_connect_timeout_s")
    environment = os.environ | {f"RAY_{name}": "1" for name in limits}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, never answers
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "xgenmm", "caption", str(tmp_path / "images")]
        command += ["-o", str(tmp_path / "out"), "--model", "demo", "--ray", address]
        ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=60)
    assert ended.returncode == 1
    assert f"ray: no cluster at '{address}' (" in ended.stderr.decode()
