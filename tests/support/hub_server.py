"""A server with the parts of the Hugging Face hub's API that its client uses, and with faults.

It serves model information, the file tree, and `resolve` (HEAD and GET, with ranges), which
redirects large files to a content store under another host name.
"""

import hashlib
import json
import os
import re
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from types import TracebackType
from urllib.parse import unquote, urlsplit

CHUNK = 2**16


@dataclass(frozen=True)
class Seen:
    """A request: its path without the query, and two of its headers."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Faults:
    """What goes wrong with a file. The first request to meet a fault consumes it."""

    cut: dict[str, list[int]] = field(default_factory=dict)  # bytes sent before the connection ends
    reset: dict[str, int] = field(default_factory=dict)  # bytes sent before the connection is reset
    hold: dict[str, int] = field(default_factory=dict)  # bytes sent before waiting for `release`
    wrong_byte: dict[str, int] = field(default_factory=dict)  # position of a flipped byte
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """A context manager that serves `repos`, {repository: {file name: content}}, on a free port.

    If there is a `token`, requests to the hub, but not to its content store, need it. `sizes`
    overrides the file sizes that the hub states. `answers` replaces the answers to requests: the
    first function whose pattern occurs in the path writes to the client what it likes.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]], token: str | None = None) -> None:
        self.repos = repos
        self.token = token
        self.sizes: dict[str, object] = {}
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.faults = Faults()
        self.seen: list[Seen] = []
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        """The hub's address, as for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def store_url(self) -> str:
        """The content store's address: the same server under another host name."""
        return f"http://localhost:{self._server.server_port}"

    def revision(self, repo: str) -> str:
        """The repository's commit id, a digest of its files' names and contents."""
        digest = hashlib.sha1()
        for name, content in sorted(self.repos[repo].items()):
            digest.update(f"{name}\0{blob_id(content)}\0".encode())
        return digest.hexdigest()

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.faults.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent if a client has gone, which some tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def blob_id(content: bytes) -> str:
    """Git's blob id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    """Whether the hub keeps a file in its content store (LFS)."""
    return name.endswith((".safetensors", ".model", ".bin"))


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 0

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.seen.append(
                Seen(self.command, path, self.headers["Range"], self.headers["Authorization"])
            )
            for pattern, answer in hub.answers.items():
                if re.search(pattern, path):
                    self.close_connection = True
                    return answer(self)
            if match := re.fullmatch(r"/store/([^/]+/[^/]+)/([^/]+)", path):
                return self._send_file(match[1], match[2], body)
            if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
                return self._send_error(401, "RepoNotFound")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
                return self._send_listing(match[1], match[2], match[3])
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._resolve(match[1], match[2], match[3], body)
            return self._send_error(404, "EntryNotFound")

        def _known(self, repo: str, revision: str | None) -> bool:
            if repo not in hub.repos:
                self._send_error(404, "RepoNotFound")
                return False
            if revision not in (None, "main", hub.revision(repo)):
                self._send_error(404, "RevisionNotFound")
                return False
            return True

        def _send_listing(self, repo: str, kind: str | None, revision: str | None) -> None:
            if not self._known(repo, revision):
                return
            entries = []
            for name, content in hub.repos[repo].items():
                size = hub.sizes.get(name, len(content))
                entry = {"size": size, "blobId": blob_id(content), "oid": blob_id(content)}
                entry |= {"rfilename": name, "path": name, "type": "file"}
                if is_large(name):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {
                        "size": size, "sha256": digest, "oid": digest, "pointerSize": 134
                    }  # fmt: skip
                entries.append(entry)
            info = {"id": repo, "modelId": repo, "sha": hub.revision(repo), "siblings": entries}
            self._send(200, json.dumps(entries if kind == "tree" else info).encode())

        def _resolve(self, repo: str, revision: str, name: str, body: bool) -> None:
            if not self._known(repo, revision):
                return None
            if name not in hub.repos[repo]:
                return self._send_error(404, "EntryNotFound")
            content = hub.repos[repo][name]
            headers = {"X-Repo-Commit": hub.revision(repo)}
            if is_large(name):
                headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                headers["X-Linked-Size"] = str(len(content))
                headers["Location"] = f"{hub.store_url}/store/{repo}/{name}"
                return self._send(302, b"", headers)
            headers["ETag"] = f'"{blob_id(content)}"'
            return self._send_file(repo, name, body, headers)

        def _send_file(
            self, repo: str, name: str, body: bool, headers: dict[str, str] | None = None
        ) -> None:
            content = hub.repos[repo][name]
            start, status, headers = 0, 200, dict(headers or {})
            if self.headers["Range"]:
                start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
                status = 206
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers["Accept-Ranges"] = "bytes"
            if not body:
                self._send(status, b"", headers | {"Content-Length": str(len(content))})
                return
            sent = bytearray(content[start:])
            if name in hub.faults.wrong_byte:
                sent[hub.faults.wrong_byte.pop(name)] ^= 1
            cuts = hub.faults.cut.get(name)
            limit = cuts.pop(0) if cuts else len(sent)
            reset = name in hub.faults.reset
            limit = hub.faults.reset.pop(name, limit)
            hold = hub.faults.hold.pop(name, None)
            self._send_head(status, headers | {"Content-Length": str(len(sent))})
            try:
                for at in range(0, min(limit, len(sent)), CHUNK):
                    if hold is not None and at >= hold:
                        hub.faults.held.set()
                        hub.faults.release.wait()
                        hold = None
                    self.wfile.write(sent[at : min(at + CHUNK, limit)])
            except ConnectionError:
                self.close_connection = True  # the client was killed
            if reset:
                # Closing a socket without lingering resets the connection.
                self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
            if limit < len(sent):
                self.close_connection = True

        def _send_error(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self._send_head(status, {"Content-Length": str(len(body)), **(headers or {})})
            if self.command == "GET":
                self.wfile.write(body)

        def _send_head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

    return Handler
