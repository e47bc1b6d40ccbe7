"""Hubs that send too much, never end or answer nonsense; damaged manifests and lock files.

A selection of the cases of `scripts.hostile.downloads`.
"""

import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.support.hub_repository import BIG, NAME, REPO, assert_complete
from tests.support.hub_server import HubServer
from xgenmm.__main__ import main
from xgenmm.checkpoints import hub as hub_client
from xgenmm.checkpoints.download import download
from xgenmm.checkpoints.registry import Release
from xgenmm.errors import CheckpointError

RELEASE = Release(NAME, (REPO,), "apache-2.0", "for tests", None)
LISTING = f"^/api/models/{REPO}"
FILE = rf"/store/.*/{BIG}"
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "PAUSE_SECONDS", 0.01)


def respond(status: int = 200, body: bytes = b"", **headers: str) -> Answer:
    """An answer with these headers, `_` in their names for `-`."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    """Send a body until the client goes."""
    respond()(handler)
    while True:
        handler.wfile.write(b" " * 2**16)


def redirect_loop(handler: BaseHTTPRequestHandler) -> None:
    respond(302, Location=handler.path, Content_Length="0")(handler)


def assert_refused(hub: HubServer, root: Path, pattern: str, answer: Answer, message: str) -> None:
    """Assert that the download fails with the message, and succeeds once the hub is honest."""
    hub.answers[pattern] = answer
    with pytest.raises(CheckpointError, match=message) as error:
        download(RELEASE, root, hub.url)
    assert len(str(error.value)) < 500
    hub.answers.clear()
    download(RELEASE, root, hub.url)
    assert_complete(root, hub)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (endless, "it sends more than 16,777,216 bytes"),
        (redirect_loop, "it redirects more than 5 times"),
        (respond(302, Location="file:///etc/passwd"), "unsupported protocol"),
        (respond(403, b"no " * 10**5, X_Error_Message="no " * 10_000), "status 403, no no no"),
        (respond(200, b"x", Content_Encoding="gzip"), "it sends compressed data"),
        (respond(200, b"<html>"), "Invalid JSON: expected value"),
        (respond(200, b"{}"), "id is missing; sha is missing; siblings is missing"),
        (lambda _: None, "disconnected"),
    ],
)
def test_listing_is_bounded_and_validated(
    hub: HubServer, root: Path, answer: Answer, message: str
) -> None:
    assert_refused(
        hub, root, LISTING, answer, rf"no valid response from the hub at .* \(.*{message}"
    )


def test_size_that_is_not_a_number_is_named(hub: HubServer, root: Path) -> None:
    hub.sizes[BIG] = "24"
    with pytest.raises(CheckpointError, match=r"siblings\.\d\.size is '24', but should be a valid"):
        download(RELEASE, root, hub.url)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (endless, "it must have 263,000 bytes, but the hub sends more; it has been deleted"),
        (redirect_loop, r"the hub refuses to send it \(it redirects more than 5 times"),
        (respond(404), r"the hub refuses to send it \(status 404"),
        (respond(503), r"connection was lost after 0 of \d+ bytes \(status 503"),
        (respond(429, Retry_After="9" * 10), r"lost after .* \(status 429.*, retry after 1e\+10 s"),
    ],
)
def test_file_is_bounded(hub: HubServer, root: Path, answer: Answer, message: str) -> None:
    message = message.replace("263,000", str(len(hub.repos[REPO][BIG])))
    assert_refused(hub, root, FILE, answer, f"{BIG}: .*{message}")


@pytest.mark.parametrize("started", [False, True])
def test_hub_that_stops_sending_is_given_up(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    def stall(handler: BaseHTTPRequestHandler) -> None:
        if started:
            respond(200, b"x")(handler)
        hub.faults.release.wait()

    monkeypatch.setattr(hub_client, "ANSWER_SECONDS", 2.0)  # the honest answers are faster
    monkeypatch.setattr(hub_client, "STALL_SECONDS", 2.0)
    monkeypatch.setattr(hub_client, "ATTEMPTS", 1)
    hub.answers[FILE] = stall
    with pytest.raises(CheckpointError, match=f"{BIG}: the connection was lost after .* too long"):
        download(RELEASE, root, hub.url)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("releases.lock.json", {NAME: []}, f"{NAME} is .*, but should be an object"),
        ("releases.lock.json", {NAME: {"repo": 7}}, "repo is 7, but should be a valid string"),
        (f"{NAME}/manifest.json", {"files": {"../a.json": {}}}, "but should be the name of a file"),
        (f"{NAME}/manifest.json", {"files": {"a.json": {"size": "1"}}}, "size is '1', but should"),
        (f"{NAME}-bf16.partial/.progress", {"plan": 1}, "plan is 1, but should be an object"),
    ],
)
def test_damaged_state_is_named(
    hub: HubServer,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: object,
    message: str,
) -> None:
    command = "download"
    if file.startswith(NAME):
        download(RELEASE, root, hub.url)
        command = "verify" if file.endswith("manifest.json") else "convert"
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))
    assert main([command, NAME]) == 1
    assert re.fullmatch(
        rf"error: {root / file}: .*{message}.*; delete it\n", capsys.readouterr().err
    )


def test_copy_of_a_link_out_of_the_folder_is_refused(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "notes.json").symlink_to("/etc/passwd")
    assert main(["convert", str(source)]) == 1
    assert f"error: {source}/notes.json is a link out of its folder" in capsys.readouterr().err
    assert not source.with_name("mine-bf16").exists()
