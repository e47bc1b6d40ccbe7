"""Images by URL from servers that mean no good, and what requests leave on the disk."""

import json
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import httpx
import pytest

from serving.compat import FOLDERS
from tests.conftest import FETCH_BYTES
from tests.server.client import (
    SECONDS,
    answer,
    ask,
    assert_answers,
    data_url,
    example_image,
    scene_image,
    when_free,
)
from tests.support.odd_server import Connection, OddServer, odd_server
from tests.support.server import LocalServer

OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def arrived() -> threading.Event:
    """Set when `odd` has received a request for `a`."""
    return threading.Event()


@pytest.fixture
def odd(arrived: threading.Event) -> Iterator[OddServer]:
    """A server of files without an end: `a` slowly, already in its headers; `b` fast."""

    def drip(connection: Connection) -> None:
        arrived.set()
        connection.send(OK + b"A: ")
        connection.drip(b"a")

    with odd_server() as started:
        started.answers = {"a": drip, "b": flood}
        yield started


def flood(connection: Connection) -> None:
    connection.send(OK + b"\r\n")
    while True:
        connection.send(bytes(100_000))


def wait_until_gone(folders: set[str]) -> None:
    """Wait until Cog has no folder for any of these predictions."""
    deadline = time.monotonic() + SECONDS
    while left := {name for name in folders if (FOLDERS / name).exists()}:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/", "http://localhost/", "http://[::1]/a.png", "http://169.254.169.254/"],
)
def test_private_address_is_refused_by_default(endless_server: LocalServer, url: str) -> None:
    prediction = ask(endless_server, images=[example_image(), url])
    assert prediction["status"] == "failed"
    assert f"images[1]: {url} leads to " in prediction["error"]
    assert "which has no public address" in prediction["error"]


def test_endless_file_is_refused(server: LocalServer, odd: OddServer) -> None:
    prediction = ask(server, image=odd.url("b"))
    assert f"image: {odd.url('b')} has more than {FETCH_BYTES} bytes" in prediction["error"]
    prediction = ask(server, images=[example_image(), odd.url("b")])
    assert f"images[1]: {odd.url('b')} has more than {FETCH_BYTES // 2}" in prediction["error"]
    assert_answers(server)


def test_too_many_images_are_refused_before_any_is_fetched(
    server: LocalServer, odd: OddServer
) -> None:
    prediction = ask(server, images=[odd.url("a")] * 10_000)
    assert "images: 10000 given; at most " in prediction["error"]
    assert not odd.requests


def test_download_ends_when_its_client_leaves(
    server: LocalServer, odd: OddServer, arrived: threading.Event
) -> None:
    url = httpx.URL(server.url)
    leaving = HTTPConnection(url.host, url.port)
    body = json.dumps({"input": {"image": odd.url("a")}})
    leaving.request("POST", "/predictions", body, {"Content-Type": "application/json"})
    assert arrived.wait(SECONDS)
    leaving.close()
    assert odd.closed.wait(SECONDS)


def test_cancelling_ends_the_download(
    server: LocalServer, odd: OddServer, arrived: threading.Event
) -> None:
    url = f"{server.url}/predictions/downloading"
    headers = {"Prefer": "respond-async"}
    when_free(lambda: httpx.put(url, json={"input": {"image": odd.url("a")}}, headers=headers))
    assert arrived.wait(SECONDS)
    assert httpx.post(f"{url}/cancel").status_code == 200
    assert odd.closed.wait(SECONDS)
    wait_until_gone({"downloading"})


def test_no_request_leaves_anything_on_the_disk(server: LocalServer, odd: OddServer) -> None:
    def put(name: str, **inputs: object) -> httpx.Response:
        url = f"{server.url}/predictions/{name}"
        return when_free(lambda: httpx.put(url, json={"input": inputs}, timeout=SECONDS))

    spilled = data_url(scene_image("scene-8.png").resize((2000, 2000)), "BMP")  # 16 MB
    assert answer(put("spilled", image=spilled).json())
    assert answer(put("plain", image=example_image()).json())
    assert put("refused", image=odd.url("b")).json()["status"] == "failed"
    assert put("damaged", image="data:image/png;base64,AAAA").json()["status"] == "failed"
    assert put("invalid", top_p=2).status_code == 422
    wait_until_gone({"spilled", "plain", "refused", "damaged", "invalid"})
