"""Fixtures shared by test modules: Cog's server with the demo checkpoint, and a file server."""

import signal
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.server import LocalServer, serving

LOAD_SECONDS = 120.0

# A shell makes its background jobs ignore Ctrl-C, and with them the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


FETCH_BYTES = 10_000_000  # limit of `server`


@pytest.fixture(scope="session")
def server() -> Iterator[LocalServer]:
    """Cog's server with the demo checkpoint, which may fetch images from this machine."""
    environment = {
        "XGENMM_MODEL": "demo",
        "XGENMM_PRIVATE_ADDRESSES": "1",
        "XGENMM_FETCH_BYTES": str(FETCH_BYTES),
        "XGENMM_FETCH_SECONDS": "600",
    }
    with serving(environment) as started:
        started.wait_ready(LOAD_SECONDS)
        yield started


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    """The URL of an HTTP server for the files in `tmp_path`."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{started.server_port}"
        started.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without logging each request."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""
