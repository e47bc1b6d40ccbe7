"""Downloads from servers that are slow, endless, malformed, or lead to private addresses."""

import gzip
import socket
import zlib
from collections.abc import Callable, Iterator

import pytest

from tests.support.odd_server import Answer, Connection, OddServer, odd_server
from xgenmm import InputError
from xgenmm.preprocessing import fetch
from xgenmm.preprocessing.fetch import FetchLimits, is_public, start_fetch

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
LIMITS = FetchLimits(seconds=60, max_bytes=1000, max_redirects=3)


@pytest.fixture
def server() -> Iterator[OddServer]:
    with odd_server() as started:
        yield started


def sends(content: bytes) -> Answer:
    return lambda connection: connection.send(content)


def body(content: bytes, headers: bytes = b"") -> Answer:
    return sends(OK + headers + b"Content-Length: %d\r\n\r\n" % len(content) + content)


def drips(start: bytes, content: bytes) -> Answer:
    def answer(connection: Connection) -> None:
        connection.send(start)
        connection.drip(content)

    return answer


def redirects(target: str) -> Answer:
    head = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
    return sends(head.encode())


@pytest.mark.parametrize(
    "answer",
    [
        Connection.wait_closed,
        drips(OK + b"A: ", b"a"),
        drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drips(OK + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"")),
        drips(CHUNKED + b"0\r\n", b"A: b\r\n"),
    ],
    ids=["silence", "header", "100 Continue", "empty gzip members", "trailers"],
)
def test_total_time_is_bounded(server: OddServer, answer: Answer) -> None:
    server.answers["a"] = answer
    download = start_fetch(server.url("a"), FetchLimits(seconds=0.2))
    with pytest.raises(InputError, match=r"^image: http://.*/a takes longer than 0\.2 s$"):
        download.result()


@pytest.mark.parametrize(
    "answer",
    [
        drips(OK + b"\r\n", bytes(100)),
        sends(OK + b"Content-Length: 1001\r\n\r\n"),
        body(gzip.compress(bytes(1001)), b"Content-Encoding: gzip\r\n"),
        body(zlib.compress(bytes(10**7)), b"Content-Encoding: deflate\r\n"),
    ],
    ids=["endless body", "Content-Length", "gzip", "deflate"],
)
def test_length_is_bounded(server: OddServer, answer: Answer) -> None:
    server.answers["a"] = answer
    with pytest.raises(InputError, match=r"/a has more than 1000 bytes$"):
        start_fetch(server.url("a"), LIMITS).result()


def test_body_is_returned(server: OddServer) -> None:
    server.answers["a"] = body(b"image")
    server.answers["b"] = body(gzip.compress(b"image"), b"Content-Encoding: gzip\r\n")
    server.answers["c"] = redirects("/a")
    for path in "abc":
        assert start_fetch(server.url(path), LIMITS).result() == b"image"


def test_types_that_are_refused_depend_on_the_input(server: OddServer) -> None:
    server.answers["a"] = body(b"clip", b"Content-Type: video/mp4\r\n")
    server.answers["b"] = body(b"<html>", b"Content-Type: text/html\r\n")
    assert start_fetch(server.url("a"), LIMITS, "video", kind="video").result() == b"clip"
    with pytest.raises(InputError, match=r"^image: .*/a is video/mp4, not an image$"):
        start_fetch(server.url("a"), LIMITS).result()
    with pytest.raises(InputError, match=r"^video: .*/b is text/html, not an image or a video$"):
        start_fetch(server.url("b"), LIMITS, "video", kind="video").result()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sends(b"HTTP/1.1 404 Gone\r\n\r\n"), "/a returned HTTP 404"),
        (sends(OK + b"Content-Length: 9\r\n\r\nabc"), r"/a cannot be fetched \(peer closed"),
        (sends(b"\0" * 9000), r"/a cannot be fetched \(illegal"),
        (body(b"<html>", b"Content-Type: Text/HTML; charset=utf-8\r\n"), "/a is text/html, not an"),
        (body(b"text", b"Content-Encoding: gzip\r\n"), r"/a cannot be fetched \(Error -3"),
        (
            body(gzip.compress(b"x")[:-1], b"Content-Encoding: gzip\r\n"),
            r"\(compressed data is cut short\)",
        ),
        (body(b"x", b"Content-Encoding: br\r\n"), "/a is encoded with br"),
        (redirects("/a"), "/a has more than 3 redirects"),
        (redirects("file:///etc/passwd"), "/a leads to 'file:/etc/passwd', which is not"),
        (redirects("http://127.0.0.1:99999/"), "/a leads to 'http://127.0.0.1:99999/', which is"),
    ],
)
def test_answer_that_is_no_image_is_an_error(
    server: OddServer, answer: Answer, message: str
) -> None:
    server.answers["a"] = answer
    with pytest.raises(InputError, match=message):
        start_fetch(server.url("a"), LIMITS).result()


@pytest.mark.parametrize("url", ["http://[", "http:///a", "ftp://a/", "http://a\0b/", "http://../"])
def test_invalid_url_is_an_error(url: str) -> None:
    with pytest.raises(InputError, match=r"^images\[1\]: "):
        start_fetch(url, LIMITS, "images[1]").result()


def test_cancelling_closes_the_connection(server: OddServer) -> None:
    server.answers["a"] = drips(OK + b"\r\n", b"a")
    server.answers["b"] = body(b"image")
    download = start_fetch(server.url("a"), LIMITS)
    assert start_fetch(server.url("b"), LIMITS).result() == b"image"  # `a` does not block it
    assert download.cancel()
    assert server.closed.wait(10)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),  # NAT64
        ("::ffff:8.8.8.8", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::1", False),
        ("2001:db8::1", False),
        ("2002:7f00:1::", False),  # 6to4
        ("fc00::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
    ],
)
def test_address_is_public(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], list[str]]:
    """A function that lets a host name have these addresses, and returns the list of lookups."""

    def set_addresses(name: str, addresses: list[str]) -> list[str]:
        lookups: list[str] = []

        def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
            lookups.append(host)
            found = addresses if host == name else [host]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        return lookups

    return set_addresses


def test_private_addresses_are_refused_at_any_hop(
    server: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = FetchLimits(private_addresses=False)
    server.answers["image"] = body(b"image")
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "[::ffff:127.0.0.1]"):
        with pytest.raises(InputError, match=r"leads to .*, which has no public address$"):
            start_fetch(server.url("image", host), limits).result()
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    assert start_fetch(server.url("image"), limits).result() == b"image"
    server.answers["hop"] = redirects(server.url("image", "127.0.0.2"))
    with pytest.raises(InputError, match=r"/hop leads to 127\.0\.0\.2, which has no public"):
        start_fetch(server.url("hop"), limits).result()


def test_name_is_resolved_once_and_stays_in_host_and_tls(
    server: OddServer,
    monkeypatch: pytest.MonkeyPatch,
    resolve: Callable[[str, list[str]], list[str]],
) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda address: address.startswith("127."))
    limits = FetchLimits(private_addresses=False)
    # Nothing listens at the second address; the first is not allowed.
    lookups = resolve("images.example", ["10.0.0.1", "127.0.0.2", "127.0.0.1"])
    server.answers["a"] = body(b"image")
    assert start_fetch(server.url("a", "images.example"), limits).result() == b"image"
    assert lookups == ["images.example"]
    assert f"\r\nHost: images.example:{server.port}\r\n".encode() in server.requests[0]
    url = server.url("a", "images.example").replace("http:", "https:")
    with pytest.raises(InputError, match="cannot be fetched"):
        start_fetch(url, limits).result()
    assert b"images.example" in server.requests[1]  # TLS: the first message names the server


def test_proxy_is_used_unless_addresses_are_checked(
    server: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url(""))
    server.answers["a"] = body(b"image")
    assert start_fetch("http://nothing.invalid/a", LIMITS).result() == b"image"
    assert server.requests[0].startswith(b"GET http://nothing.invalid/a HTTP/1.1\r\n")
    with pytest.raises(InputError, match="cannot be fetched"):
        start_fetch("http://nothing.invalid/a", FetchLimits(private_addresses=False)).result()
