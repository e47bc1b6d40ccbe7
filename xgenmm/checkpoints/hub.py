"""A client of the Hugging Face hub that limits what a server can make it do.

Every request is limited in time, redirects and bytes, whatever the server sends. `huggingface_hub`
reads answers of any size into memory, writes more of a file than it is told to expect, and waits as
long as a server asks; only its settings and addresses are used here.
"""

import asyncio
import io
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import httpx
from huggingface_hub import get_token, hf_hub_url
from pydantic import BaseModel, Field, ValidationError
from tqdm import tqdm

from xgenmm.checkpoints.registry import RepositoryId, Revision, Sha256
from xgenmm.errors import CheckpointError, explain, printable
from xgenmm.files import MAX_BYTES

MAX_REDIRECTS = 5
ANSWER_SECONDS = 20.0  # until the headers have arrived, redirects included
STALL_SECONDS, STALL_BYTES = 30.0, 64 * 1024  # a body must not be slower than this
ATTEMPTS = 5  # in a row that bring less than STALL_BYTES
PAUSE_SECONDS = 1.0  # before the second attempt; doubled for each further one
MAX_PAUSE_SECONDS = 60.0  # that a server may ask for

_BUSY = {408, 429, 500, 502, 503, 504}
_NETWORK_ERRORS = (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError)


class Lfs(BaseModel):
    """The digest of a large file."""

    sha256: Sha256


class ListedFile(BaseModel):
    """A file of a repository: `lfs` is stated for large files, git's `blobId` for small ones."""

    rfilename: str
    size: Annotated[int, Field(ge=0, le=2**60)] | None = None
    lfs: Lfs | None = None
    blobId: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None  # noqa: N815


class Repository(BaseModel):
    """The hub's description of a repository at a revision."""

    id: RepositoryId
    sha: Revision
    siblings: list[ListedFile]


class HubError(Exception):
    """The hub answers with an error, with nonsense, or not at all; the message says which."""


class RepositoryNotFoundError(HubError):
    """The hub has no such repository, or gives no access to it; `gated` if it has terms."""

    def __init__(self, gated: bool) -> None:
        super().__init__("no access")
        self.gated = gated


class RevisionNotFoundError(HubError):
    """The hub has the repository, but not the revision."""


class WrongSizeError(HubError):
    """The hub sends more bytes than it stated."""


class BusyError(HubError):
    """The hub cannot answer now; `retry_after` is the wait that it asks for, in seconds, or 0."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Hub:
    """The hub at an address."""

    endpoint: str

    def repository(self, repo: str, revision: str | None) -> Repository:
        """Return the description of a repository at a revision, by default the newest.

        Raises HubError.
        """
        place = f"/revision/{revision}" if revision else ""
        url = f"{self.endpoint}/api/models/{repo}{place}?blobs=true"
        try:
            content = asyncio.run(_read(url))
            return Repository.model_validate_json(content, strict=True)
        except ValidationError as error:
            raise HubError(f"the description of {repo}: {explain(error)}") from error
        except _NETWORK_ERRORS as error:
            raise HubError(_reason(error)) from error

    def append(self, repository: Repository, name: str, size: int, out: io.BufferedWriter) -> None:
        """Append the rest of a file of `size` bytes to `out`, which may have its beginning.

        Reconnects as long as connections bring data, and writes at most `size` bytes; fewer if the
        hub has fewer.

        Raises CheckpointError if the connection is lost for good or the hub refuses to send the
        file, and WrongSizeError if it sends more bytes.
        """
        url = hf_hub_url(repository.id, name, revision=repository.sha, endpoint=self.endpoint)
        asyncio.run(_append(url, name, size, out))


async def _read(url: str) -> bytes:
    content = bytearray()
    async with _get(url) as response:
        await _receive(response, MAX_BYTES, content.extend)
    return bytes(content)


async def _append(url: str, name: str, size: int, out: io.BufferedWriter) -> None:
    failures = 0
    while (start := out.seek(0, os.SEEK_END)) < size:
        pause = PAUSE_SECONDS * 2**failures
        try:
            await _append_once(url, name, size, out)
            return
        except WrongSizeError:
            raise
        except BusyError as error:
            reason, pause = str(error), max(pause, error.retry_after)
        except HubError as error:
            raise CheckpointError(f"{name}: the hub refuses to send it ({error})") from error
        except _NETWORK_ERRORS as error:
            reason = _reason(error)
        received = out.seek(0, os.SEEK_END)
        failures = failures + 1 if received - start < STALL_BYTES else 0
        if failures == ATTEMPTS or pause > MAX_PAUSE_SECONDS:
            raise CheckpointError(
                f"{name}: the connection was lost after {received} of {size} bytes ({reason}); run "
                "the same command again, it resumes"
            )
        await asyncio.sleep(pause)


async def _append_once(url: str, name: str, size: int, out: io.BufferedWriter) -> None:
    start = out.tell()
    async with _get(url, start) as response:
        if start and response.status_code != httpx.codes.PARTIAL_CONTENT:
            start = 0
            out.truncate(0)
        with tqdm(
            total=size, initial=start, unit="B", unit_scale=True, desc=name, disable=None
        ) as bar:

            def write(chunk: bytes) -> None:
                out.write(chunk)
                bar.update(len(chunk))

            await _receive(response, size - start, write)


@asynccontextmanager
async def _get(url: str, start: int = 0) -> AsyncIterator[httpx.Response]:
    """Request a URL from byte `start` on; the body, not compressed, is not read yet.

    Raises HubError if the hub answers with an error, and _NETWORK_ERRORS.
    """
    headers = {"accept-encoding": "identity"}
    if token := get_token():
        headers["authorization"] = f"Bearer {token}"
    if start:
        headers["range"] = f"bytes={start}-"
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS, verify=_certificates()) as client:
        async with asyncio.timeout(ANSWER_SECONDS):
            response = await _follow(client, client.build_request("GET", url, headers=headers))
        try:
            _check(response)
            yield response
        finally:
            await response.aclose()


@cache
def _certificates() -> ssl.SSLContext:
    """Read the system's certificates, which takes longer than a request, only once."""
    return httpx.create_ssl_context()


async def _follow(client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    """Send a request and follow redirects; httpx would read their bodies, of any size."""
    for _ in range(MAX_REDIRECTS + 1):
        response = await client.send(request, stream=True)
        if response.next_request is None:
            return response
        await response.aclose()
        request = response.next_request
    raise HubError(f"it redirects more than {MAX_REDIRECTS} times")


def _check(response: httpx.Response) -> None:
    """Raise HubError unless the response is a success that can be read."""
    headers, status = response.headers, response.status_code
    code = headers.get("x-error-code")
    if response.is_success:
        if headers.get("content-encoding", "identity") != "identity":
            raise HubError("it sends compressed data, which was not asked for")
        return
    if code == "RevisionNotFound":
        raise RevisionNotFoundError(code)
    if code in ("RepoNotFound", "GatedRepo") or status == httpx.codes.UNAUTHORIZED:
        raise RepositoryNotFoundError(gated=code == "GatedRepo")
    phrase = printable(headers.get("x-error-message") or response.reason_phrase)
    message = f"status {status}, {phrase}"
    if status in _BUSY:
        wait = headers.get("retry-after", "")
        seconds = float(wait) if wait.isascii() and wait.isdigit() else 0.0
        raise BusyError(message + (f", retry after {seconds:g} s" if seconds else ""), seconds)
    raise HubError(message)


async def _receive(response: httpx.Response, limit: int, write: Callable[[bytes], object]) -> None:
    """Read the body; raise WrongSizeError beyond `limit` bytes, TimeoutError if it is too slow."""
    received = counted = 0
    async with asyncio.timeout(STALL_SECONDS) as stall:
        async for chunk in response.aiter_raw():
            received += len(chunk)
            if received > limit:
                raise WrongSizeError(f"it sends more than {limit:,} bytes")
            write(chunk)
            if received - counted >= STALL_BYTES:
                counted = received
                stall.reschedule(asyncio.get_running_loop().time() + STALL_SECONDS)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it takes too long"
    return printable(error) or type(error).__name__
