"""What a hostile hub sends: endless, dripping, malformed."""

import contextlib
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

CHUNK = b"0" * 2**16
Answer = Callable[[BaseHTTPRequestHandler], None]


def send(
    handler: BaseHTTPRequestHandler,
    body: bytes = b"",
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> None:
    handler.send_response(status)
    for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
        handler.send_header(key, value)
    handler.end_headers()
    write(handler, body)


def write(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(data)


def endless(
    handler: BaseHTTPRequestHandler,
    start: bytes,
    chunk: bytes,
    length: int | None = None,
    status: int = 200,
) -> None:
    """Send `chunk` until the client goes away, whatever `length` says."""
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(start)
        for _ in range(2 * 10**9 // len(chunk)):
            handler.wfile.write(chunk)


def gzip_bomb(handler: BaseHTTPRequestHandler) -> None:
    """Send 4 GB of zeros as 4 MB of gzip."""
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Connection", "close")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(64):
            handler.wfile.write(packer.compress(bytes(2**26)))


def chunked(handler: BaseHTTPRequestHandler, chunks: list[bytes]) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for chunk in [*chunks, b""]:
        write(handler, b"%x\r\n%s\r\n" % (len(chunk), chunk))


def drip(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """Send one byte every two seconds."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    with contextlib.suppress(OSError):
        for place in range(len(data)):
            handler.wfile.write(data[place : place + 1])
            time.sleep(2)


def not_http(handler: BaseHTTPRequestHandler) -> None:
    write(handler, b"SSH-2.0-OpenSSH_9\r\n")


def dripping_headers(handler: BaseHTTPRequestHandler) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(10_000):
            handler.wfile.write(b"a")
            time.sleep(2)


def endless_headers(handler: BaseHTTPRequestHandler) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(10**8):
            handler.wfile.write(b"X-%d: %s\r\n" % (number, b"a" * 1000))


def continue_for_ever(handler: BaseHTTPRequestHandler) -> None:
    with contextlib.suppress(OSError):
        for _ in range(10_000):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.5)
