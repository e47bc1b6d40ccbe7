"""Cog's own HTTP server as a process on this machine, for programs that talk to it.

`serving` starts `scripts/serve` on a free port and stops it at the end; the server can be asked
once `wait_ready` returns. `events` reads an answer that streams, and `data_url` turns a file into
what an input for an image takes.
"""

import base64
import contextlib
import json
import mimetypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).resolve().parent.parent

STOP_SECONDS = 10.0
"""How long the server may take to leave by itself."""


class ServerError(RuntimeError):
    """The server did not come up; the message is what it logged."""


class Event(NamedTuple):
    """One server-sent event: `start`, `output`, `metric`, `log` or, at the end, `completed`."""

    name: str
    data: dict[str, Any]


@dataclass(frozen=True)
class LocalServer:
    """A server that was started; `url` has no slash at its end."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def health(self) -> dict[str, Any]:
        """What `GET /health-check` says; `{"status": "STARTING"}` while nothing listens yet."""
        try:
            answer: dict[str, Any] = httpx.get(f"{self.url}/health-check", timeout=10).json()
        except httpx.TransportError:
            return {"status": "STARTING"}
        return answer

    def wait_ready(
        self, timeout: float, waiting: Callable[[float], None] = lambda seconds: None
    ) -> float:
        """Return after how many seconds the model was loaded.

        waiting: called several times a second with the seconds so far, to show progress.
        Raises `ServerError` when loading fails or takes longer than `timeout` seconds.
        """
        started = time.monotonic()
        while True:
            seconds = time.monotonic() - started
            health = self.health()
            if health["status"] == "READY":
                return seconds
            if health["status"] == "SETUP_FAILED":
                raise ServerError(health["setup"]["logs"])
            if self.process.poll() is not None or seconds > timeout:
                raise ServerError(self.log())
            waiting(seconds)
            time.sleep(0.1)

    def log(self) -> str:
        """All that the server and its worker have written so far."""
        return self.log_file.read_text(errors="replace")


@contextlib.contextmanager
def serving(environment: Mapping[str, str], root: Path = ROOT) -> Iterator[LocalServer]:
    """Start a server and stop it at the end: `with serving({"XGENMM_MODEL": "demo"}) as server`.

    environment: variables for the server on top of this process's own.
    root: the copy of the repository to serve.
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
            start_new_session=True,  # it and its worker are one group, which stops as one
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
    """Yield the events of a response to `Accept: text/event-stream`, each as it arrives."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield Event(name, json.loads(value))


def predict(client: httpx.Client, body: bytes) -> dict[str, Any]:
    """A prediction that is waited for, from the bytes of its JSON.

    Raises RuntimeError for one that does not succeed.
    """
    headers = {"Content-Type": "application/json"}
    response = client.post("/predictions", content=body, headers=headers)
    while response.status_code == httpx.codes.CONFLICT:
        # Cog sends an answer a moment before its place is free again.
        time.sleep(0.001)
        response = client.post("/predictions", content=body, headers=headers)
    prediction: dict[str, Any] = response.json()
    if prediction.get("status") != "succeeded":
        raise RuntimeError(f"the server answered {response.status_code}: {prediction}")
    return prediction


def data_url(file: Path) -> str:
    """Return a file's bytes as a data URL."""
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
