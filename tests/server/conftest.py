"""Servers with an endless and with a video checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.server.client import MAX_CONCURRENCY, SECONDS
from tests.support import tiny
from tests.support.paths import DEMO
from tests.support.server import LocalServer, serving


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, changed so that it never generates an end token."""
    folder = tmp_path_factory.mktemp("endless")
    for file in DEMO.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    parameters = load_file(folder / "model.safetensors")
    for token in json.loads((folder / "added_tokens.json").read_text()).values():
        if token < len(parameters["vlm.lang_model.lm_head.bias"]):
            parameters["vlm.lang_model.lm_head.bias"][token] = -1e4
    save_file(parameters, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def endless_server(endless: Path) -> Iterator[LocalServer]:
    """Cog's server with the endless checkpoint, few slots and the default limits on images."""
    environment = {"XGENMM_MODEL": str(endless), "COG_MAX_CONCURRENCY": str(MAX_CONCURRENCY)}
    with serving(environment) as started:
        started.wait_ready(SECONDS)
        yield started


@pytest.fixture(scope="session")
def video_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """Cog's server with a tiny video checkpoint, which may fetch files from this machine."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("video"), temporal="gttm")
    environment = {"XGENMM_MODEL": str(folder), "XGENMM_PRIVATE_ADDRESSES": "1"}
    with serving(environment) as started:
        started.wait_ready(SECONDS)
        yield started
