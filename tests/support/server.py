"""Cog's HTTP server as a process on this machine, and what its clients need.

The vLLM plugin's tests run in an environment without httpx-sse, so only `events` imports it.
"""

import base64
import contextlib
import mimetypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.support.paths import ROOT

STOP_SECONDS = 10.0  # until a server that does not stop is killed


class ServerError(RuntimeError):
    """The server did not start; the message is its log."""


class Event(NamedTuple):
    """A server-sent event: `start`, `output`, `metric`, `log` or, at the end, `completed`."""

    name: str
    data: dict[str, Any]


@dataclass(frozen=True)
class LocalServer:
    """A running server; `url` has no trailing slash."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def health(self) -> dict[str, Any]:
        """The answer to `GET /health-check`; `{"status": "STARTING"}` before anything listens."""
        try:
            answer: dict[str, Any] = httpx.get(f"{self.url}/health-check", timeout=10).json()
        except httpx.TransportError:
            return {"status": "STARTING"}
        return answer

    def wait_ready(self, timeout: float) -> None:
        """Wait until the model is loaded.

        Raises:
            ServerError: loading failed or took more than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while (health := self.health())["status"] != "READY":
            if health["status"] == "SETUP_FAILED":
                raise ServerError(health["setup"]["logs"])
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(self.log())
            time.sleep(0.1)

    def log(self) -> str:
        """Everything that the server and its worker have written so far."""
        return self.log_file.read_text(errors="replace")


@contextlib.contextmanager
def serving(environment: Mapping[str, str], root: Path = ROOT) -> Iterator[LocalServer]:
    """Run a server for the duration of a `with` block; it needs `wait_ready` before requests.

    Args:
        environment: variables for the server in addition to those of this process.
        root: the checkout, or a copy of it, to serve.
    """
    port = free_port()
    interpreter = Path(sys.executable).parent
    inherited = {**os.environ, "PATH": f"{interpreter}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [root / "scripts" / "serve"],
            env={**inherited, **environment, "PORT": str(port)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # one process group, to kill the server with its worker
        )
        try:
            yield LocalServer(f"http://127.0.0.1:{port}", process, Path(log.name))
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def events(response: httpx.Response) -> Iterator[Event]:
    """The events of a response to `Accept: text/event-stream`, each as it arrives."""
    from httpx_sse import EventSource

    for event in EventSource(response).iter_sse():
        yield Event(event.event, event.json())


def data_url(file: Path) -> str:
    """The content of a file as a data URL."""
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
