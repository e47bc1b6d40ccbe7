"""Hostile addresses: a server on this machine that misbehaves in a way that its path names."""

import asyncio
import gzip
import json
import struct
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from socket import SO_LINGER, SOL_SOCKET
from urllib.parse import unquote

from scripts.hostile.files import png, write_images
from scripts.hostile.runner import Arguments, Case

Writer = asyncio.StreamWriter
Behavior = Callable[[Writer], Awaitable[None]]

DRIP_SECONDS = 0.5
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
GZIP = OK + b"Content-Encoding: gzip\r\n"
EMPTY_GZIP = gzip.compress(b"")


def sends(content: bytes) -> Behavior:
    """Send this and close."""

    async def behave(writer: Writer) -> None:
        writer.write(content)
        await writer.drain()

    return behave


def repeats(start: bytes, content: bytes, seconds: float = 0) -> Behavior:
    """Send `start`, then `content` for ever, with a pause after each."""

    async def behave(writer: Writer) -> None:
        writer.write(start)
        while True:
            writer.write(content)
            await writer.drain()
            await asyncio.sleep(seconds)

    return behave


def drips(content: bytes) -> Behavior:
    """Send a byte at a time, then the last one for ever."""

    async def behave(writer: Writer) -> None:
        for byte in content:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(DRIP_SECONDS)
        await repeats(b"", content[-1:], DRIP_SECONDS)(writer)

    return behave


async def resets(writer: Writer) -> None:
    """Reset the connection in the middle of a body."""
    writer.write(OK + b"Content-Length: 1000\r\n\r\nabc")
    await writer.drain()
    socket = writer.get_extra_info("socket")
    socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))


def body(content: bytes, headers: bytes = b"") -> Behavior:
    return sends(OK + b"Content-Length: %d\r\n" % len(content) + headers + b"\r\n" + content)


def redirect(target: bytes) -> Behavior:
    return sends(b"HTTP/1.1 302 Found\r\nLocation: " + target + b"\r\nContent-Length: 0\r\n\r\n")


def bomb(encoding: str) -> Behavior:
    """Send 1 GB of zeros, packed once for each encoding that is named."""

    async def behave(writer: Writer) -> None:
        content = bytes(1 << 30)
        for name in encoding.split(", "):
            content = zlib.compress(content, 9, wbits=31 if name == "gzip" else 15)
        await body(content, f"Content-Encoding: {encoding}\r\n".encode())(writer)

    return behave


# Those that would hold a connection for as long as the client waits.
HANGING: dict[str, Behavior] = {
    "no answer": repeats(b"", b"", DRIP_SECONDS),
    "headers drip": drips(OK + b"X-Drip: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
    "status line drips": drips(b"HTTP/1.1 200 OKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKK"),
    "body drips": repeats(OK + b"Content-Length: 100000\r\n\r\n", b"a", DRIP_SECONDS),
    "body stops": repeats(OK + b"Content-Length: 100000\r\n\r\nabc", b"", DRIP_SECONDS),
    "100 Continue, slowly": repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n", DRIP_SECONDS),
    "100 Continue, fast": repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0.01),
    "103 Early Hints": repeats(b"", b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n", DRIP_SECONDS),
    "empty gzip members": repeats(GZIP + b"\r\n", EMPTY_GZIP, DRIP_SECONDS),
    "gzip header drips": drips(GZIP + b"\r\n\x1f\x8b\x08\x08" + b"a" * 100),
    "chunks drip": repeats(CHUNKED, b"1\r\na\r\n", DRIP_SECONDS),
    "chunk extension drips": drips(CHUNKED + b"1;" + b"a" * 100),
    "trailers drip": drips(CHUNKED + b"0\r\nA: " + b"a" * 100),
    "404 body drips": repeats(b"HTTP/1.1 404 No\r\nContent-Length: 9\r\n\r\n", b"", DRIP_SECONDS),
    "redirects drip": drips(b"HTTP/1.1 302 Found\r\nLocation: /x" + b"x" * 100),
}

BEHAVIORS: dict[str, Behavior] = {
    "closes at once": sends(b""),
    "resets": resets,
    "garbage": sends(bytes(range(256)) * 10),
    "HTTP/0.9": sends(png()),
    "status 600": sends(b"HTTP/1.1 600 Odd\r\n\r\n"),
    "status abc": sends(b"HTTP/1.1 abc\r\n\r\n"),
    "status 204": sends(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "status 206": sends(b"HTTP/1.1 206 Part\r\nContent-Length: 3\r\n\r\nabc"),
    "status 304": sends(b"HTTP/1.1 304 Same\r\n\r\n"),
    "status 101": sends(b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
    "status 407": sends(b"HTTP/1.1 407 Proxy\r\nContent-Length: 0\r\n\r\n"),
    "body is short": sends(OK + b"Content-Length: 1000\r\n\r\nabc"),
    "body is empty": body(b""),
    "HTML": body(b"<html>No image</html>", b"Content-Type: text/html\r\n"),
    "length is -1": sends(OK + b"Content-Length: -1\r\n\r\nabc"),
    "length is text": sends(OK + b"Content-Length: many\r\n\r\nabc"),
    "length is 10**30": sends(OK + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\nabc"),
    "two lengths": sends(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nabc"),
    "length of 1 TB": repeats(OK + b"Content-Length: 1099511627776\r\n\r\n", bytes(1 << 16)),
    "endless body": repeats(OK + b"\r\n", bytes(1 << 16)),
    "endless chunks": repeats(CHUNKED, b"10000\r\n" + bytes(1 << 16) + b"\r\n"),
    "chunk size is text": sends(CHUNKED + b"zz\r\n"),
    "chunk size of 10**30": sends(CHUNKED + b"1" + b"0" * 25 + b"\r\n"),
    "endless chunk extension": repeats(CHUNKED + b"1;", b"a" * 4096),
    "endless header": repeats(OK + b"A: ", b"a" * 4096),
    "endless headers": repeats(OK, b"A: b\r\n" * 1000),
    "endless status": repeats(b"HTTP/1.1 200 ", b"a" * 4096),
    "endless trailers": repeats(CHUNKED + b"0\r\n", b"A: b\r\n" * 1000),
    "header without name": sends(OK + b": b\r\n\r\n"),
    "header with NUL": sends(OK + b"A: \0\r\n\r\n"),
    "not gzip": body(b"hello", b"Content-Encoding: gzip\r\n"),
    "gzip is cut": body(gzip.compress(png())[:20], b"Content-Encoding: gzip\r\n"),
    "gzip of 1 GB": bomb("gzip"),
    "gzip in gzip": bomb("gzip, gzip, gzip"),
    "deflate of 1 GB": bomb("deflate"),
    "unknown encoding": body(b"hello", b"Content-Encoding: rot13\r\n"),
    "redirect to itself": redirect(b"/redirect to itself"),
    "redirect to nothing": sends(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"),
    "redirect to a file": redirect(b"file:///etc/passwd"),
    "redirect to FTP": redirect(b"ftp://127.0.0.1/a.png"),
    "redirect to data": redirect(b"data:image/png;base64,AAAA"),
    "redirect to a bad port": redirect(b"http://127.0.0.1:99999/"),
    "redirect to a bad address": redirect(b"http://[::1"),
    "redirect to no host": redirect(b"http:///a.png"),
    "redirect that is not ASCII": redirect(b"/\xff\xfe"),
    "redirect of 90 kB": redirect(b"/" + b"a" * 90_000),
    "redirect to a closed port": redirect(b"http://127.0.0.1:9/"),
}

ADDRESSES = {
    "closed port": "http://127.0.0.1:9/a.png",
    "port 0": "http://127.0.0.1:0/a.png",
    "port 99999": "http://127.0.0.1:99999/a.png",
    "port is text": "http://127.0.0.1:x/a.png",
    "no host": "http:///a.png",
    "only a scheme": "http://",
    "bracket": "http://[",
    "host of 10,000 letters": "http://" + "a" * 10_000 + "/a.png",
    "label of 64 letters": "http://" + "a" * 64 + ".example/a.png",
    "host with a space": "http://a b/a.png",
    "host with NUL": "http://a\0b/a.png",
    "host with dots": "http://../a.png",
    "host of no such name": "http://nothing.invalid/a.png",
    "host with a surrogate": "http://\ud800.example/a.png",
    "host of other letters": "http://bücher.invalid/a.png",
    "zero-width letters": "http://\u200b\u200d/a.png",
    "path with a surrogate": "http://127.0.0.1:9/\ud800.png",
    "address of 100 kB": "http://127.0.0.1:9/" + "a" * 100_000,
    "IPv6 without a zone": "http://[fe80::1]/a.png",
    "IPv6 with a bad zone": "http://[fe80::1%25none]/a.png",
    "broadcast": "http://255.255.255.255/a.png",
    "multicast": "http://224.0.0.1/a.png",
    "user and password": "http://a:b@127.0.0.1:9/a.png",
    "line feed": "http://127.0.0.1:9/a\nHost: b",
}

# What must be refused with --public-addresses-only; PORT is that of the hostile server.
PRIVATE = {
    "loopback": "http://127.0.0.1:PORT/good",
    "localhost": "http://localhost:PORT/good",
    "localhost with a dot": "http://localhost.:PORT/good",
    "loopback, other": "http://127.9.9.9:PORT/good",
    "any": "http://0.0.0.0:PORT/good",
    "decimal": "http://2130706433:PORT/good",
    "hexadecimal": "http://0x7f000001:PORT/good",
    "octal": "http://0177.0.0.1:PORT/good",
    "short": "http://127.1:PORT/good",
    "full-width digits": "http://\uff11\uff12\uff17.0.0.1:PORT/good",
    "IPv6 loopback": "http://[::1]:PORT/good",
    "v4-mapped": "http://[::ffff:127.0.0.1]:PORT/good",
    "v4-mapped, hexadecimal": "http://[::ffff:7f00:1]:PORT/good",
    "metadata": "http://169.254.169.254/latest/meta-data",
    "10/8": "http://10.0.0.1/a.png",
    "shared": "http://100.64.0.1/a.png",
    "multicast": "http://224.0.0.1/a.png",
    "reserved": "http://240.0.0.1/a.png",
    "unique local": "http://[fd00::1]/a.png",
    "link-local": "http://[fe80::1]/a.png",
    "6to4": "http://[2002:7f00:1::]/a.png",
    "NAT64": "http://[64:ff9b::7f00:1]/a.png",
}


def address_cases(port: int) -> Iterator[Case]:
    """Yield the cases of the server at a port, and of addresses at which there is none."""
    for name in HANGING:
        yield _case("addresses that hang", name, f"http://127.0.0.1:{port}/{name}")
    for name in BEHAVIORS:
        yield _case("addresses", name, f"http://127.0.0.1:{port}/{name}")
    for name, url in ADDRESSES.items():
        yield _case("addresses", name, url)
    for name, url in PRIVATE.items():
        yield _case("private addresses", name, url.replace("PORT", str(port)), public_only=True)


def _case(group: str, name: str, url: str, *, public_only: bool = False) -> Case:
    def build(folder: Path) -> Arguments:
        write_images(folder / "images", 1)
        rows = [{"image": "images/0.png"}, {"image": url}, {"image": "images/0.png"}]
        (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [str(folder / "t.jsonl"), *(["--public-addresses-only"] if public_only else [])]

    return Case(group, name, build, rows=3, errors=1)


@contextmanager
def hostile_server() -> Iterator[int]:
    """Run the server in a thread; the value is its port."""
    ports: SimpleQueue[int] = SimpleQueue()
    stopped: Future[None] = Future()

    async def serve() -> None:
        server = await asyncio.start_server(_answer, "0.0.0.0", 0)
        ports.put(server.sockets[0].getsockname()[1])
        await asyncio.wrap_future(stopped)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    yield ports.get()
    stopped.set_result(None)
    thread.join()


async def _answer(reader: asyncio.StreamReader, writer: Writer) -> None:
    try:
        request = await reader.readuntil(b"\r\n\r\n")
        path = request.decode("latin-1").partition(" HTTP/")[0].partition(" /")[2]
        name = unquote(path.partition("?")[0])
        behavior = ({"good": body(png())} | HANGING | BEHAVIORS).get(name, body(b"unknown"))
        await behavior(writer)
    except (OSError, asyncio.CancelledError, asyncio.IncompleteReadError):
        pass  # the client has gone, or the program ends
    finally:
        writer.close()
