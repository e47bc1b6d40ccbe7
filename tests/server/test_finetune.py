"""Cog's server that trains: progress, the adapter, faults, hostile datasets and cancellation.

And the server that answers, with the adapter that the other has made.
"""

import base64
import io
import json
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.client import SECONDS, ask, streamed, when_free
from tests.support import adapters, tiny
from tests.support.datasets import archive_url, dataset_zip
from tests.support.odd_server import Connection, odd_server
from tests.support.server import Event, LocalServer, events, serving

FEW_STEPS = {"base": "demo", "lora_rank": 4, "epochs": 1, "batch_size": 2, "learning_rate": 0.01}
ENDLESS = FEW_STEPS | {"epochs": 1000}
QUESTION = {"question": "What color is it?", "choices": ["red", "green", "blue"]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with a tiny one in the demo's place."""
    folder = tmp_path_factory.mktemp("weights")
    tiny.checkpoint(folder / "demo")
    return folder


@pytest.fixture(scope="module")
def trainer(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The server that trains, with a folder for temporary files of its own."""
    temporary = tmp_path_factory.mktemp("temporary")
    settings = {
        "COG_PREDICT_TYPE_STUB": "finetune.py:Finetuner",
        "XGENMM_HOME": str(weights),
        "XGENMM_PRIVATE_ADDRESSES": "1",
        "XGENMM_DATASET_FILES": "40",
        "TMPDIR": str(temporary),
    }
    with serving(settings) as started:
        started.wait_ready(SECONDS)
        yield started


@pytest.fixture(scope="module")
def training(trainer: LocalServer) -> list[Event]:
    """The events of a training."""
    with streamed(trainer, "train", dataset=archive_url(dataset_zip()), **FEW_STEPS) as response:
        return list(events(response))


@pytest.fixture(scope="module")
def adapter(training: list[Event]) -> str:
    """The adapter of that training, as a data URL."""
    assert training[-1].data["status"] == "succeeded", training[-1]
    (url,) = training[-1].data["output"]
    return str(url)


@pytest.fixture
def leftovers(trainer: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder below which a training writes."""
    (folder,) = tmp_path_factory.getbasetemp().glob("temporary0/xgenmm-finetune-*")
    return folder


def wait_empty(folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while list(folder.iterdir()):
        assert time.monotonic() < deadline, list(folder.rglob("*"))
        time.sleep(0.1)


def trainings(server: LocalServer) -> list[psutil.Process]:
    """The processes that train."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in processes if "finetune" in process.cmdline()]


def adapter_files(url: str) -> dict[str, bytes]:
    content = base64.b64decode(url.partition(",")[2])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = [(member.name, archive.extractfile(member)) for member in archive]
        return {name: file.read() for name, file in files if file}


def test_training_streams_its_progress_and_returns_the_adapter(
    training: list[Event], adapter: str, leftovers: Path
) -> None:
    log = [event.data["data"] for event in training if event.name == "log"]
    assert "checking the dataset\n" in log
    assert any("6 samples of data.jsonl" in line for line in log)
    assert re.fullmatch(r"step \d of 3, loss \d\.\d+, rate .*\n", log[-2])
    assert log[-1].startswith("done: adapter.tar, ")
    assert log == [line.replace("\r", "") for line in log]
    assert training[-1].data["metrics"]["steps"] == 3
    files = adapter_files(adapter)
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    assert (config["r"], config["base_model_name_or_path"]) == (4, "demo")
    wait_empty(leftovers)


def test_dataset_by_url_with_faults_is_refused_and_they_are_named(
    trainer: LocalServer, file_server: str, tmp_path: Path
) -> None:
    sources = {number: f"none-{number}.png" for number in range(30)}
    sources |= {1: "../../../../etc/passwd", 2: f"{file_server}/0.png"}
    (tmp_path / "set.zip").write_bytes(dataset_zip(30, sources))
    prediction = ask(trainer, dataset=f"{file_server}/set.zip", **FEW_STEPS)
    assert prediction["status"] == "failed"
    error = prediction["error"]
    assert "dataset: 30 faults, so nothing was trained:\n" in error
    assert error.count("\n") == 1 + 20
    assert "data.jsonl:1: image none-0.png: cannot open" in error
    assert "data.jsonl:2: image ../../../../etc/passwd: leads out of the dataset" in error
    assert f"data.jsonl:3: image {file_server}/0.png" in error
    assert "which has no public address" in error


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "file of the server": ({"dataset": __file__}, "dataset: must be an http"),
    "not an archive": ({"dataset": "data:,hello"}, "dataset: is not a complete archive"),
    "many files": ({"dataset": archive_url(dataset_zip(40))}, "dataset: has more than 40 files"),
    "base that is not here": (
        {"base": "xgen-mm-phi3-mini-instruct-dpo-r-v1.5"},
        "base: xgen-mm-phi3-mini-instruct-dpo-r-v1.5 is not on this server; it has demo",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_error_names_the_input(trainer: LocalServer, leftovers: Path, kind: str) -> None:
    inputs, message = REFUSED[kind]
    prediction = ask(trainer, **FEW_STEPS | {"dataset": "data:,"} | inputs)
    assert prediction["status"] == "failed"
    assert message in prediction["error"]
    wait_empty(leftovers)


def test_cancelling_ends_the_training_and_leaves_nothing(
    trainer: LocalServer, leftovers: Path
) -> None:
    url = f"{trainer.url}/predictions/endless"
    with streamed(trainer, "endless", dataset=archive_url(dataset_zip()), **ENDLESS) as response:
        rest = events(response)
        for event in rest:
            if event.name == "log" and event.data["data"].startswith("step "):
                break
        assert len(trainings(trainer)) == 2  # with its tether
        busy = httpx.post(f"{trainer.url}/predictions", json={"input": {"dataset": "data:,"}})
        assert busy.status_code == 409
        started = time.monotonic()
        assert httpx.post(f"{url}/cancel").status_code == 200
        last = list(rest)[-1].data
    assert last["status"] == "canceled"
    assert time.monotonic() - started < 10
    assert not trainings(trainer)
    wait_empty(leftovers)


def test_cancelling_ends_the_download_of_a_dataset(trainer: LocalServer, leftovers: Path) -> None:
    url, arrived = f"{trainer.url}/predictions/download", threading.Event()
    with odd_server() as odd:
        odd.answers["a"] = drip(arrived)
        body = {"input": FEW_STEPS | {"dataset": odd.url("a")}}
        headers = {"Prefer": "respond-async"}
        when_free(lambda: httpx.put(url, json=body, headers=headers))
        assert arrived.wait(SECONDS)
        assert httpx.post(f"{url}/cancel").status_code == 200
        assert odd.closed.wait(SECONDS)
    wait_empty(leftovers)


def probabilities(prediction: dict[str, Any]) -> list[float]:
    """Of the choices of `QUESTION`."""
    assert prediction["status"] == "succeeded", prediction
    found: list[float] = prediction["metrics"]["choices"]
    return found


def test_server_that_answers_takes_the_adapter_of_a_request(
    weights: Path, adapter: str, tmp_path: Path
) -> None:
    settings = {"XGENMM_MODEL": "demo", "XGENMM_HOME": str(weights)}
    other = adapters.write(tmp_path / "other", tiny.checkpoint(tmp_path / "base", seed=4))
    wrong = archive_url(adapters.pack(tmp_path / "other.tar", other).read_bytes())
    with (
        serving(settings | {"XGENMM_PRIVATE_ADDRESSES": "1"}) as server,
        odd_server() as odd,
    ):
        arrived = threading.Event()
        odd.answers["a"] = drip(arrived)
        server.wait_ready(SECONDS)
        before = probabilities(ask(server, **QUESTION))
        trained = probabilities(ask(server, adapter=adapter, **QUESTION))
        assert trained != before
        for url, message in (
            (wrong, "adapter: adapter.tar is for base, not for "),
            ("data:,none", "adapter: adapter.tar is damaged, or neither a folder nor a tar"),
            (__file__, "adapter: must be an http"),
        ):
            assert message in ask(server, adapter=url, **QUESTION)["error"]

        running = f"{server.url}/predictions/running"
        body = {"input": {"adapter": adapter, "image": odd.url("a")}}
        httpx.put(running, json=body, headers={"Prefer": "respond-async"}, timeout=SECONDS)
        assert arrived.wait(SECONDS)
        assert "adapter: 1 predictions with another adapter" in ask(server, **QUESTION)["error"]
        assert probabilities(ask(server, adapter=adapter, **QUESTION)) == trained
        assert httpx.post(f"{running}/cancel").status_code == 200
        assert odd.closed.wait(SECONDS)
        assert probabilities(ask(server, **QUESTION)) == before
        assert server.health()["status"] == "READY"
        assert "cannot be freed" not in server.log()

    (tmp_path / "adapter.tar").write_bytes(base64.b64decode(adapter.partition(",")[2]))
    with serving(settings | {"XGENMM_ADAPTER": str(tmp_path / "adapter.tar")}) as server:
        server.wait_ready(SECONDS)
        assert probabilities(ask(server, **QUESTION)) == trained


def drip(arrived: threading.Event) -> Callable[[Connection], None]:
    """An answer without an end; `arrived` is set when it begins."""

    def answer(connection: Connection) -> None:
        arrived.set()
        connection.send(b"HTTP/1.1 200 OK\r\n\r\n")
        connection.drip(b"a")

    return answer
