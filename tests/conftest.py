"""What several test modules share: Cog's server with a checkpoint, and a server of files."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.local_server import ROOT, LocalServer, serving

DEMO = ROOT / "weights" / "demo"
LOAD_SECONDS = 120.0


@pytest.fixture(scope="session")
def server() -> Iterator[LocalServer]:
    """Cog's server with the demo checkpoint."""
    with serving({"XGENMM_MODEL": "demo"}) as started:
        started.wait_ready(LOAD_SECONDS)
        yield started


@pytest.fixture(scope="session")
def endless_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """Cog's server with a checkpoint that talks until it is cut off: the demo unable to end."""
    folder = tmp_path_factory.mktemp("endless")
    for file in DEMO.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    parameters = load_file(folder / "model.safetensors")
    for token in json.loads((folder / "added_tokens.json").read_text()).values():
        if token < len(parameters["vlm.lang_model.lm_head.bias"]):
            parameters["vlm.lang_model.lm_head.bias"][token] = -1e4
    save_file(parameters, folder / "model.safetensors")
    with serving({"XGENMM_MODEL": str(folder)}) as started:
        started.wait_ready(LOAD_SECONDS)
        yield started


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    """The address of an HTTP server for the files of `tmp_path`."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{started.server_port}"
        started.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a line on the screen for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
