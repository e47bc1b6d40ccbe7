"""A hostile request to Cog's server: how it is sent, and what is wrong with the reply.

A case is handled if the reply comes in time and is an answer, or an error that names the input in
at most a screen, whichever is expected.
"""

import base64
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

Expected = Literal["answer", "refuse", "either", "any"]

SECONDS = 20.0  # longest time for a reply
LONGEST_MESSAGE = 4000  # characters, about a screen
INTERNAL_ERROR = re.compile(
    r"Traceback|\b(Attribute|Assertion|Import|Index|Key|Lookup|Memory|OS|Overflow|Recursion|Runtime"
    r"|Type|UnicodeDecode|UnicodeEncode|Value|ZeroDivision)Error\b"
)


@dataclass(frozen=True)
class Reply:
    """What came back: an HTTP status, or None if the connection was closed without one."""

    status: int | None
    body: bytes = b""

    def prediction(self) -> dict[str, Any]:
        """The prediction that is the body, or its last event; empty if it is something else."""
        try:
            value = json.loads(self.body.rpartition(b"\ndata: ")[2])
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


Send = Callable[[str], Reply]
"""Sends requests to the server with this URL; raises OSError or TimeoutError."""


@dataclass(frozen=True)
class Case:
    """One hostile request.

    group: the class of attack.
    expected: `any` also allows that the connection is closed without a reply.
    names: the input that an error must name; empty if there is none.
    recovery: seconds within which the next normal request must be right.
    costs: what the server loses: a slot, until it starts again, or all of them, or itself, so that
        its supervisor starts it again.
    """

    group: str
    name: str
    send: Send
    expected: Expected = "refuse"
    names: str = ""
    recovery: float = 10.0
    costs: Literal["", "slot", "server"] = ""


def problem(case: Case, reply: Reply) -> str:
    """What is wrong with a reply; empty if the case was handled."""
    if reply.status is None:
        return "" if case.expected == "any" else "the connection was closed"
    prediction, text = reply.prediction(), reply.body.decode(errors="replace")
    if reply.status >= 500 and reply.status not in (501, 505):
        return f"HTTP {reply.status}: {text[:200]}"
    if reply.status < 400 and prediction.get("status") != "failed":
        return "answered, not refused" if case.expected == "refuse" else ""
    error = str(prediction.get("error", text))
    if case.expected == "answer":
        return f"refused: {error[:200]}"
    if len(error) > LONGEST_MESSAGE:
        return f"an error of {len(error)} characters"
    if INTERNAL_ERROR.search(error):
        return f"an internal error: {error[:200]}"
    named = (f" {case.names}: ", f'"{case.names}"', f'"{case.names}/', f"input.{case.names}")
    if case.names and not any(name in error for name in named):
        return f"the error does not name {case.names}: {error[:200]}"
    return ""


def predict(inputs: dict[str, Any] | Callable[[], dict[str, Any]]) -> Send:
    """Post inputs, or what a function returns, as JSON."""

    def send(url: str) -> Reply:
        values = inputs() if callable(inputs) else inputs
        return post(url, json.dumps({"input": values}).encode())

    return send


def post(
    url: str, body: bytes, seconds: float = SECONDS, headers: dict[str, str] | None = None
) -> Reply:
    """Post a JSON body, again while the server is full."""
    deadline = time.monotonic() + seconds
    while True:
        reply = request(url, "POST", "/predictions", body, headers, deadline - time.monotonic())
        if reply.status != http.client.CONFLICT or time.monotonic() > deadline:
            return reply
        time.sleep(0.01)


def request(
    url: str,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    seconds: float = SECONDS,
) -> Reply:
    """Send a well-formed request. Raises TimeoutError if the reply takes longer than `seconds`."""
    lines = {
        "Host": "localhost",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return exchange(url, [f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body], seconds)


@contextmanager
def connection(url: str, seconds: float = SECONDS) -> Iterator[socket.socket]:
    """A connection to the server."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), max(seconds, 0.001)) as opened:
        yield opened


def exchange(url: str, parts: Iterable[bytes], seconds: float = SECONDS) -> Reply:
    """Send raw bytes and read one reply."""
    deadline = time.monotonic() + seconds
    with connection(url, seconds) as opened:
        try:
            for part in parts:
                opened.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a server may reply before it has read everything
        return _read(opened, deadline)


def _read(opened: socket.socket, deadline: float) -> Reply:
    response = http.client.HTTPResponse(opened)
    body = bytearray()
    try:
        opened.settimeout(max(deadline - time.monotonic(), 0.001))
        response.begin()
        while chunk := response.read1(1 << 16):
            body += chunk
            opened.settimeout(max(deadline - time.monotonic(), 0.001))
    except (http.client.HTTPException, ConnectionResetError):
        return Reply(response.status if isinstance(response.status, int) else None, bytes(body))
    finally:
        response.close()
    return Reply(response.status, bytes(body))


def leave(url: str, *parts: bytes) -> Reply:
    """Send raw bytes, then close the connection."""
    with connection(url) as opened:
        for part in parts:
            opened.sendall(part)
    return Reply(None)


def at_once(count: int, send: Send) -> Send:
    """Do the same from many clients at once; the reply is the last."""

    def send_all(url: str) -> Reply:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(send, [url] * count))[-1]

    return send_all


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Bytes as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
