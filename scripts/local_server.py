"""Cog's HTTP server as a process on this machine, for the programs in scripts/."""

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 10.0  # until a server that does not stop is killed


class ServerError(RuntimeError):
    """The server did not start; the message is its log."""


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

    def wait_ready(
        self, timeout: float, progress: Callable[[float], None] = lambda seconds: None
    ) -> float:
        """Wait until the model is loaded; returns the seconds it took.

        Args:
            timeout: in seconds.
            progress: called several times a second with the seconds so far.

        Raises:
            ServerError: loading failed or timed out.
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
                raise ServerError(self.log_file.read_text(errors="replace"))
            progress(seconds)
            time.sleep(0.1)


@contextlib.contextmanager
def serving(environment: Mapping[str, str], root: Path = ROOT) -> Iterator[LocalServer]:
    """Run a server for the duration of a `with` block; it needs `wait_ready` before requests.

    Args:
        environment: variables for the server in addition to those of this process.
        root: the checkout to serve.
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


def predict(client: httpx.Client, body: bytes) -> dict[str, Any]:
    """Post a JSON request and wait for the finished prediction.

    Raises:
        RuntimeError: the prediction did not succeed.
    """
    headers = {"Content-Type": "application/json"}
    response = client.post("/predictions", content=body, headers=headers)
    while response.status_code == httpx.codes.CONFLICT:
        # Cog frees the slot of a prediction a moment after it has sent the answer.
        time.sleep(0.001)
        response = client.post("/predictions", content=body, headers=headers)
    prediction: dict[str, Any] = response.json()
    if prediction.get("status") != "succeeded":
        raise RuntimeError(f"the server answered {response.status_code}: {prediction}")
    return prediction


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
