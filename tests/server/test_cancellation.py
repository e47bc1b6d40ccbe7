"""Cog's server while predictions run: cancelling, disconnecting, joining, a full server, SIGTERM.

The checkpoint never ends an answer by itself, so a prediction runs until something ends it.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from tests.server.client import (
    ENDLESS,
    MAX_CONCURRENCY,
    METRICS,
    SECONDS,
    ask,
    cancel,
    streamed,
    until_output,
)
from tests.support.server import Event, LocalServer, events, serving


@contextlib.contextmanager
def running(server: LocalServer, *prediction_ids: str) -> Iterator[dict[str, Iterator[Event]]]:
    """Start endless predictions and wait for the first output of each.

    All must still run at the end of the block, except those that the test has removed from the
    dictionary.
    """
    with contextlib.ExitStack() as responses:
        streams = {
            name: until_output(responses.enter_context(streamed(server, name, **ENDLESS)))
            for name in prediction_ids
        }
        yield streams
        for name, rest in streams.items():
            assert cancel(server, name, rest)["status"] == "canceled"


def wait_refused(server: LocalServer) -> None:
    """Wait until the server accepts no connections."""
    deadline = time.monotonic() + SECONDS
    with contextlib.suppress(httpx.ConnectError):
        while time.monotonic() < deadline:
            httpx.get(server.url)
        raise AssertionError("the server still takes requests")


def test_stream_starts_before_the_answer_is_complete(endless_server: LocalServer) -> None:
    with streamed(endless_server, "running", **ENDLESS) as response:
        rest = until_output(response)
        last = cancel(endless_server, "running", rest)
    assert last["status"] == "canceled"
    assert last["metrics"]["stop_reason"] == "cancelled"
    assert last["metrics"]["output_tokens"] < ENDLESS["max_new_tokens"]
    assert last["metrics"].keys() >= METRICS


def test_text_is_joined_into_few_events(endless_server: LocalServer) -> None:
    tokens, interval = 400, 0.05
    started = time.monotonic()
    with streamed(endless_server, "joined", question="Talk.", max_new_tokens=tokens) as response:
        received = [(time.monotonic(), event) for event in events(response)]
    seconds = [at - started for at, event in received if event.name == "output"]
    ended, last = received[-1]
    assert last.data["metrics"]["output_tokens"] == tokens
    # The first and the last need not be an interval after the one before.
    assert 2 < len(seconds) <= 2 + (ended - started) / interval
    assert len(seconds) < tokens / 2
    assert seconds[0] < (ended - started) / 2


def test_full_server_rejects_one_more_and_streams_to_all(endless_server: LocalServer) -> None:
    names = [f"full-{number}" for number in range(MAX_CONCURRENCY)]
    with running(endless_server, *names) as streams:
        assert endless_server.health()["status"] == "BUSY"
        refused = httpx.post(f"{endless_server.url}/predictions", json={"input": ENDLESS})
        assert refused.status_code == 409
        name, rest = streams.popitem()
        assert cancel(endless_server, name, rest)["metrics"]["batch_size"] == MAX_CONCURRENCY


def test_cancelling_one_of_many_frees_its_slot(endless_server: LocalServer) -> None:
    names = [f"among-{number}" for number in range(MAX_CONCURRENCY)]
    with running(endless_server, *names) as streams:
        last = cancel(endless_server, names[1], streams.pop(names[1]))
        assert last["status"] == "canceled"
        assert ask(endless_server, question="Talk.", max_new_tokens=3)["status"] == "succeeded"


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
def test_disconnecting_frees_the_slot(endless_server: LocalServer, accept: str) -> None:
    names = [f"staying-{number}" for number in range(MAX_CONCURRENCY - 1)]
    with running(endless_server, *names):
        url = httpx.URL(endless_server.url)
        leaving = HTTPConnection(url.host, url.port)
        leaving.request(
            "POST",
            "/predictions",
            json.dumps({"input": ENDLESS}),
            {"Content-Type": "application/json", "Accept": accept},
        )
        deadline = time.monotonic() + SECONDS
        while endless_server.health()["status"] != "BUSY":
            assert time.monotonic() < deadline, "the request has not arrived"
        leaving.close()
        assert ask(endless_server, question="Talk.", max_new_tokens=3)["status"] == "succeeded"


def test_cancelling_an_unknown_prediction_returns_404(server: LocalServer) -> None:
    assert httpx.post(f"{server.url}/predictions/nobody/cancel").status_code == 404


def test_put_again_joins_the_running_prediction(endless_server: LocalServer) -> None:
    with running(endless_server, "joined"):
        url = f"{endless_server.url}/predictions/joined"
        again = httpx.put(url, json={"input": ENDLESS})
        assert again.status_code == 202
        assert (again.json()["id"], again.json()["status"]) == ("joined", "processing")


def test_sigterm_lets_running_predictions_finish_and_rejects_new_ones(endless: Path) -> None:
    tokens = 1000
    with serving({"XGENMM_MODEL": str(endless)}) as stopping:
        stopping.wait_ready(SECONDS)
        with streamed(stopping, "last", question="Talk.", max_new_tokens=tokens) as response:
            rest = until_output(response)
            stopping.process.terminate()
            wait_refused(stopping)
            last = list(rest)[-1].data
        assert last["status"] == "succeeded"
        assert last["metrics"]["output_tokens"] == tokens
        assert stopping.process.wait(SECONDS) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(stopping.process.pid, 0)
