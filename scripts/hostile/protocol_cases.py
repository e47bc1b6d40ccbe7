"""Requests that are not what HTTP, JSON or Cog's interface expect, and odd ids."""

import gzip
import json
import time
import uuid
from collections.abc import Iterator
from urllib.parse import quote

from scripts.hostile.requests import (
    Case,
    Expected,
    Reply,
    Send,
    at_once,
    connection,
    exchange,
    leave,
    post,
    request,
)

TALK = json.dumps({"input": {"question": "Talk.", "max_new_tokens": 2}}).encode()
LONG = json.dumps({"input": {"question": "Talk.", "max_new_tokens": 2048}}).encode()
POST = b"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOTS = 16

BODIES: dict[str, tuple[bytes, Expected]] = {
    "empty": (b"", "refuse"),
    "null": (b"null", "refuse"),
    "list": (b"[]", "refuse"),
    "number": (b"5", "refuse"),
    "no input": (b"{}", "either"),
    "input is null": (b'{"input": null}', "either"),
    "input is a list": (b'{"input": []}', "refuse"),
    "input is text": (b'{"input": "Talk."}', "refuse"),
    "input twice": (b'{"input": {}, "input": {"question": "Talk."}}', "either"),
    "cut": (TALK[:20], "refuse"),
    "two documents": (TALK + TALK, "refuse"),
    "comment": (b"/* */" + TALK, "refuse"),
    "single quotes": (b"{'input': {}}", "refuse"),
    "not UTF-8": (b'{"input": {"question": "\xff\xfe"}}', "refuse"),
    "UTF-16": (TALK.decode().encode("utf-16"), "refuse"),
    "byte order mark": (b"\xef\xbb\xbf" + TALK, "either"),
    "NUL": (b"\0" * 100, "refuse"),
    "100,000 brackets": (b"[" * 100_000, "refuse"),
    "input 100,000 deep": (b'{"input": ' + b'{"a":' * 100_000, "refuse"),
    "100,000 inputs": (
        json.dumps({"input": {f"a{n}": n for n in range(100_000)}}).encode(),
        "either",
    ),
    "number of 1 MB": (b'{"input": {"seed": ' + b"9" * 1_000_000 + b"}}", "refuse"),
    "50 MB of letters": (b"x" * 50_000_000, "refuse"),
    "50 MB in an unknown input": (b'{"input": {"a": "' + b"x" * 50_000_000 + b'"}}', "either"),
    "id is a number": (b'{"id": 5, "input": {}}', "refuse"),
    "id is empty": (b'{"id": "", "input": {"question": "Hi", "max_new_tokens": 2}}', "either"),
    "webhook is a number": (b'{"webhook": 5, "input": {}}', "refuse"),
    "webhook is no address": (TALK[:-1] + b', "webhook": "nothing"}', "either"),
    "webhook to a closed port": (TALK[:-1] + b', "webhook": "http://127.0.0.1:9/"}', "either"),
    "webhook to a file": (TALK[:-1] + b', "webhook": "file:///etc/passwd"}', "either"),
    "webhook of unknown events": (TALK[:-1] + b', "webhook_events_filter": ["x"]}', "either"),
}

REQUESTS: dict[str, tuple[str, str, dict[str, str], Expected]] = {
    "GET predictions": ("GET", "/predictions", {}, "refuse"),
    "DELETE predictions": ("DELETE", "/predictions", {}, "refuse"),
    "PUT without an id": ("PUT", "/predictions/", {}, "refuse"),
    "OPTIONS": ("OPTIONS", "/predictions", {}, "refuse"),
    "TRACE": ("TRACE", "/predictions", {}, "refuse"),
    "CONNECT": ("CONNECT", "localhost:80", {}, "any"),
    "unknown method": ("HACK", "/predictions", {}, "refuse"),
    "method of 10 kB": ("A" * 10_000, "/", {}, "any"),
    "unknown path": ("GET", "/nothing", {}, "refuse"),
    "path above": ("GET", "/../../../etc/passwd", {}, "refuse"),
    "path above, encoded": ("GET", "/%2e%2e/%2e%2e/etc/passwd", {}, "refuse"),
    "path with NUL": ("GET", "/%00", {}, "refuse"),
    "path of 100 kB": ("GET", "/" + "a" * 100_000, {}, "any"),
    "whole address": ("GET", "http://169.254.169.254/latest", {}, "any"),
    "cancel of an unknown id": ("POST", "/predictions/nobody/cancel", {}, "refuse"),
    "cancel of no id": ("POST", "/predictions//cancel", {}, "refuse"),
    "cancel of NUL": ("POST", "/predictions/%00/cancel", {}, "refuse"),
    "cancel of 300 characters": ("POST", f"/predictions/{'a' * 300}/cancel", {}, "refuse"),
    "GET of a cancel": ("GET", "/predictions/nobody/cancel", {}, "refuse"),
    "text": ("POST", "/predictions", {"Content-Type": "text/plain"}, "refuse"),
    "form": ("POST", "/predictions", {"Content-Type": "multipart/form-data"}, "refuse"),
    "unknown encoding": ("POST", "/predictions", {"Content-Encoding": "rot13"}, "either"),
    "odd Accept": ("POST", "/predictions", {"Accept": "*/*;q=x,,,\t"}, "either"),
    "odd Prefer": ("POST", "/predictions", {"Prefer": "wait=-1, respond-async=x"}, "either"),
    "expects 100": ("POST", "/predictions", {"Expect": "100-continue"}, "either"),
    "expects odd things": ("POST", "/predictions", {"Expect": "200-ok"}, "either"),
    "upgrade": ("POST", "/predictions", {"Upgrade": "websocket", "Connection": "upgrade"}, "any"),
    "odd traceparent": ("POST", "/predictions", {"traceparent": "00-" + "f" * 500}, "either"),
    "Host with a line": ("POST", "/predictions", {"Host": "a b:c"}, "any"),
    "header of 1 MB": ("POST", "/predictions", {"X-A": "a" * 1_000_000}, "any"),
    "1,000 headers": ("POST", "/predictions", {f"X-{n}": "a" for n in range(1000)}, "any"),
    "length is negative": ("POST", "/predictions", {"Content-Length": "-5"}, "any"),
    "length is text": ("POST", "/predictions", {"Content-Length": "many"}, "any"),
    "length of 10^30": ("POST", "/predictions", {"Content-Length": "1" + "0" * 30}, "any"),
    "length and chunks": ("POST", "/predictions", {"Transfer-Encoding": "chunked"}, "any"),
}

RAW: dict[str, bytes] = {
    "garbage": bytes(range(256)) * 40,
    "TLS": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(32),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "HTTP/9.9": b"GET / HTTP/9.9\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "line feeds only": b"GET / HTTP/1.1\nHost: a\nConnection: close\n\n",
    "header with NUL": b"GET / HTTP/1.1\r\nHost: a\r\nA: \0\r\n\r\n",
    "header without a name": b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\nHost: a\r\nA: b\r\n c\r\nConnection: close\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "chunk size is text": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "chunk of 2^64": POST + b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n",
    "smuggled request": POST + b"Content-Length: 2\r\n\r\n{}POST / HTTP/1.1\r\n\r\n",
}

IDS = {
    "200 characters": "a" * 200,
    "space": "%20",
    "emoji": quote("\U0001f600"),
    "not UTF-8": "%ff",
    "line feed": "a%0ab",
    "slash": "hostile%2Fb%2Fc",
    "dots": "...",
    "dashes": "--help",
    "quotes": "%22%27%3B%24%28id%29",
}

# Cog cannot make their folder, and loses a slot.
FATAL_IDS = {"300 characters": "a" * 300, "5,000 characters": "a" * 5000, "NUL": "%00"}


def put(prediction_id: str, body: bytes = TALK, prefer: str = "") -> Send:
    """Start a prediction with an id, which may be percent-encoded."""
    headers = {"Prefer": prefer} if prefer else {}
    return lambda url: request(url, "PUT", f"/predictions/{prediction_id}", body, headers)


def _body_of(url: str, content: bytes, encoding: str) -> Reply:
    return request(url, "POST", "/predictions", content, {"Content-Encoding": encoding})


def _leaves_stream(url: str) -> Reply:
    """Read the first bytes of a stream, then leave."""
    head = POST + b"Accept: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(LONG)
    with connection(url) as opened:
        opened.sendall(head + LONG)
        opened.recv(100)
    return Reply(None)


def _never_reads(url: str) -> Reply:
    """Ask on one connection again and again without reading, then leave."""
    with connection(url, 1) as opened:
        try:
            for _ in range(200):
                opened.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        except TimeoutError:
            pass  # the server waits until this client reads
    return Reply(None)


def _drips(url: str, content: bytes) -> Reply:
    """Send a byte at a time for a second, then leave."""
    with connection(url) as opened:
        for byte in content[:100]:
            opened.sendall(bytes([byte]))
            time.sleep(0.01)
    return Reply(None)


def _cancels_twice(url: str) -> Reply:
    name = str(uuid.uuid4())
    put(name, LONG, "respond-async")(url)
    for _ in range(2):
        reply = request(url, "POST", f"/predictions/{name}/cancel")
    return reply


def _cancels_after_end(url: str) -> Reply:
    name = str(uuid.uuid4())
    put(name)(url)
    return request(url, "POST", f"/predictions/{name}/cancel")


def _other_id(url: str) -> Reply:
    return put(str(uuid.uuid4()), b'{"id": "other", "input": {"question": "Hi"}}')(url)


def _many_connections(url: str) -> Reply:
    """Open 500 connections without a request."""
    clients = [connection(url) for _ in range(500)]
    for client in clients:
        client.__enter__()
    reply = post(url, TALK)
    for client in clients:
        client.__exit__(None, None, None)
    return reply


def _same_id_at_once(url: str) -> Reply:
    name = str(uuid.uuid4())
    return at_once(8, put(name, TALK, "respond-async"))(url)


def _starts_and_leaves(url: str) -> Reply:
    return leave(url, POST + b"Content-Length: %d\r\n\r\n" % len(LONG), LONG)


def _shuts_down(url: str) -> Reply:
    """Anyone may; `scripts/serve` starts the server again."""
    return request(url, "POST", "/shutdown")


CLIENTS: dict[str, tuple[Send, Expected]] = {
    "gzip body": (lambda url: _body_of(url, gzip.compress(TALK), "gzip"), "either"),
    "gzip bomb": (lambda url: _body_of(url, gzip.compress(bytes(100 << 20)), "gzip"), "either"),
    "leaves before the body": (lambda url: leave(url, POST + b"Content-Length: 99\r\n\r\n"), "any"),
    "leaves within the body": (
        lambda url: leave(url, POST + b"Content-Length: 99\r\n\r\n{"),
        "any",
    ),
    "leaves at once": (lambda url: leave(url), "any"),
    "leaves while it is answered": (_starts_and_leaves, "any"),
    "40 leave while they are answered": (at_once(40, _starts_and_leaves), "any"),
    "leaves a stream": (_leaves_stream, "any"),
    "40 leave their streams": (at_once(40, _leaves_stream), "any"),
    "never reads": (_never_reads, "any"),
    "head drips": (lambda url: _drips(url, POST), "any"),
    "16 heads drip": (at_once(16, lambda url: _drips(url, POST)), "any"),
    "cancels twice": (_cancels_twice, "either"),
    "cancels after the end": (_cancels_after_end, "refuse"),
    "other id in the body": (_other_id, "refuse"),
    "same id at once": (_same_id_at_once, "either"),
    "500 connections": (_many_connections, "answer"),
}


def protocol_cases() -> Iterator[Case]:
    """Yield all cases."""

    def posts(content: bytes) -> Send:
        return lambda url: post(url, content)

    def requests(method: str, path: str, headers: dict[str, str]) -> Send:
        return lambda url: request(url, method, path, TALK, headers)

    def raw(content: bytes) -> Send:
        return lambda url: exchange(url, [content])

    for name, (content, expected) in BODIES.items():
        yield Case("protocol: bodies", name, posts(content), expected)
    for name, (method, path, headers, expected) in REQUESTS.items():
        yield Case("protocol: requests", name, requests(method, path, headers), expected)
    for name, content in RAW.items():
        yield Case("protocol: requests", name, raw(content), "any")
    for name, (send, expected) in CLIENTS.items():
        yield Case("protocol: clients", name, send, expected)
    for name, prediction_id in IDS.items():
        yield Case("protocol: ids", name, put(prediction_id), "either")
    for name, prediction_id in FATAL_IDS.items():
        yield Case("protocol: ids", name, put(prediction_id), "refuse", costs="slot")
    name = "16 of 300 characters"
    yield Case("protocol: ids", name, _lose_slots, "any", recovery=90, costs="server")
    name = "POST /shutdown"
    yield Case("protocol: shutdown", name, _shuts_down, "any", recovery=30, costs="server")


def _lose_slots(url: str) -> Reply:
    for number in range(SLOTS):
        reply = put(f"{number}" + "a" * 300)(url)
    return reply
