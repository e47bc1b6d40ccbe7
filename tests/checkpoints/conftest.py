"""Fixtures that keep weights and caches in a temporary folder, and a local hub."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.hub_repository import REPO, repository
from tests.support.hub_server import HubServer
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGENMM_HOME", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that XGENMM_HOME names."""
    return tmp_path / "weights"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({REPO: repository()}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A float32 checkpoint of three shards, with an integer tensor, among unrelated files."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in repository().items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    (folder / "model.safetensors.index.json").unlink()
    last = {"head.weight": torch.randn(80_000), "steps": torch.arange(5)}
    save_file(last, folder / "z.safetensors")
    return folder
