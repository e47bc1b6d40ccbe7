"""Download over HTTP from addresses that are not trusted, with everything bounded.

The time covers the whole request: lookup, connection, headers and body. Host names are resolved
once, here, and the connection goes to an address that was checked, so that a name cannot point to
another address a moment later. Downloads stay in memory; nothing is written to disk.
"""

import asyncio
import functools
import os
import socket
import ssl
import threading
import urllib.request
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Literal

import httpx

from xgenmm.errors import InputError

CONNECT_SECONDS = 10.0
"""Longest wait for a connection; the host's next address is tried after that."""

SILENCE_SECONDS = 30.0
"""Longest wait for the next bytes."""

MAX_URL_CHARS = 200
"""Longer URLs are shortened in error messages."""

Kind = Literal["image", "video", "archive"]

# By kind: what is wanted, and the types that rule it out. Only those are refused: many servers send
# images as text/plain or worse.
_WANTED: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "image": ("an image", ("audio/", "text/", "multipart/", "video/")),
    "video": ("an image or a video", ("audio/", "text/", "multipart/")),
    "archive": ("an archive", ("audio/", "text/", "multipart/", "video/", "image/")),
}

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_6TO4 = IPv6Network("2002::/16")
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


@dataclass(frozen=True)
class FetchLimits:
    """What one download may take.

    seconds: in total, with name lookups and redirects.
    max_bytes: length of the body, also after decompression.
    max_redirects: how many are followed.
    private_addresses: whether hosts may have addresses that are not public, see `is_public`. If
        not, proxies that the environment names are not used, because they resolve names themselves.
    """

    seconds: float = 120.0
    max_bytes: int = 200_000_000
    max_redirects: int = 10
    private_addresses: bool = True


def start_fetch(
    url: str, limits: FetchLimits, name: str = "image", *, kind: Kind = "image"
) -> Future[bytes]:
    """Start to download in the background, and return the future of the body.

    Its `cancel` closes the connection, and `result` then raises CancelledError. All may be called
    from any thread; a coroutine can await `asyncio.wrap_future` of it. Each download holds up to
    `limits.max_bytes` in memory.

    Args:
        name: the input's name in error messages.
        kind: what is wanted; for `video` an image will do, too.

    The future raises InputError if the URL is invalid or its host is not allowed, if the server
    cannot be reached, answers with an error, a web page or another kind of file, or exceeds a
    limit.
    """
    return asyncio.run_coroutine_threadsafe(_Fetch(url, limits, name, kind).run(), _event_loop())


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a host on the internet.

    It does not if it is private, loopback, link-local, shared, multicast, reserved or unspecified.
    An IPv6 address that contains an IPv4 address (mapped, NAT64) is judged by that.
    """
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped or ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _GLOBAL_UNICAST or ip in _6TO4:
            return False
    return ip.is_global and not ip.is_multicast


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all downloads, in its own thread, so that none stalls the caller's loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="xgenmm-fetch", daemon=True).start()
    return loop


os.register_at_fork(after_in_child=_event_loop.cache_clear)  # threads do not survive a fork


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # takes 20 ms


@dataclass(frozen=True)
class _Fetch:
    url: str
    limits: FetchLimits
    name: str
    kind: Kind

    async def run(self) -> bytes:
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await self._follow_redirects()
        except InputError:
            raise
        except TimeoutError as error:
            raise self._error(f"takes longer than {self.limits.seconds:g} s") from error
        except Exception as error:  # a hostile URL or server makes libraries raise many kinds
            reason = str(error) or type(error).__name__
            raise self._error(f"cannot be fetched ({_shorten(reason)})") from error

    def _error(self, problem: str) -> InputError:
        return InputError(self.name, f"{_shorten(self.url)} {problem}")

    async def _follow_redirects(self) -> bytes:
        url = httpx.URL(self.url)
        for _ in range(1 + self.limits.max_redirects):
            async with self._get(url) as response:
                if not response.has_redirect_location:
                    return await self._read(response)
                url = url.join(response.headers["Location"])
        raise self._error(f"has more than {self.limits.max_redirects} redirects")

    @asynccontextmanager
    async def _get(self, url: httpx.URL) -> AsyncIterator[httpx.Response]:
        """Send a request; yields the response, whose body is still to be read."""
        if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 2**16:
            raise self._error(f"leads to {_shorten(str(url))!r}, which is not an http(s) address")
        proxied = self.limits.private_addresses and _has_proxy(url)
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        async with httpx.AsyncClient(
            verify=_ssl_context(), timeout=timeout, trust_env=proxied
        ) as client:
            hosts = [url.host] if proxied else await self._addresses(url)
            async with aclosing(await _send(client, url, hosts)) as response:
                yield response

    async def _addresses(self, url: httpx.URL) -> list[str]:
        """Resolve the host of a URL to the addresses that are allowed."""
        addresses = await _look_up(url.host, url.port or (443 if url.scheme == "https" else 80))
        if self.limits.private_addresses:
            return addresses
        if not (public := [address for address in addresses if is_public(address)]):
            raise self._error(f"leads to {url.host}, which has no public address")
        return public

    async def _read(self, response: httpx.Response) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise self._error(f"returned HTTP {response.status_code}")
        found = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        wanted, refused = _WANTED[self.kind]
        if found.startswith(refused) and found != "text/plain":
            raise self._error(f"is {_shorten(found)}, not {wanted}")
        if int(response.headers.get("Content-Length", 0)) > self.limits.max_bytes:
            raise self._too_long()
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self.limits.max_bytes:
                raise self._too_long()
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding == "identity":
            return bytes(body)
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise self._error(f"is encoded with {_shorten(encoding)}, although that was not asked")
        return await asyncio.to_thread(self._decompress, body)

    def _decompress(self, body: bytearray) -> bytes:
        decompressor = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # gzip or zlib
        content = decompressor.decompress(body, self.limits.max_bytes + 1)
        if len(content) > self.limits.max_bytes:
            raise self._too_long()
        if not decompressor.eof:
            raise zlib.error("compressed data is cut short")
        return content

    def _too_long(self) -> InputError:
        return self._error(f"has more than {self.limits.max_bytes} bytes")


async def _send(client: httpx.AsyncClient, url: httpx.URL, hosts: list[str]) -> httpx.Response:
    """Send a request to the first of `hosts` that accepts a connection.

    hosts: addresses of the URL's host, which stays the one in TLS and in the header Host.
    """
    for host in hosts:
        request = client.build_request(
            "GET",
            url.copy_with(host=host),
            headers={
                "Host": url.netloc.decode("ascii"),
                "Accept-Encoding": "identity",
                "Connection": "close",  # a connection is only good for the name it was made for
            },
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        try:
            return await client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if host == hosts[-1]:
                raise
    raise OSError(f"{url.host} has no address")


async def _look_up(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host, in the system's order of preference.

    In a thread of its own, because a name server that does not answer must neither delay the
    lookups of other hosts nor the end of the process.
    """
    found: Future[list[str]] = Future()
    found.set_running_or_notify_cancel()

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.set_result(list(dict.fromkeys(str(answer[4][0]) for answer in answers)))
        except Exception as error:  # whatever it is, the coroutine that waits must have it
            found.set_exception(error)

    threading.Thread(target=look_up, name="xgenmm-lookup", daemon=True).start()
    return await asyncio.wrap_future(found)


def _has_proxy(url: httpx.URL) -> bool:
    """Whether the environment names a proxy for a URL."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return bool(proxy) and not urllib.request.proxy_bypass(url.host)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_URL_CHARS else f"{text[:MAX_URL_CHARS]}..."
