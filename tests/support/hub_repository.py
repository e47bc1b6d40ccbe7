"""A hub repository in the released layout with small random tensors, and checks of downloads."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from tests.support.hub_server import HubServer
from xgenmm.checkpoints.manifest import verify

NAME = "xgen-mm-phi3-mini-instruct-dpo-r-v1.5"
REPO = f"Salesforce/{NAME}"
BIG = "model-00002-of-00002.safetensors"
SMALL = "model-00001-of-00002.safetensors"
TAKEN = {"config.json", "model.safetensors.index.json", "tokenizer.model", SMALL, BIG}
"""Files that belong to the checkpoint; the repository has others, which must not be downloaded."""


def tensors(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of 64 kB."""
    torch.manual_seed(seed)
    return {f"layers.{seed}.{i}.weight": torch.randn(64, 256) for i in range(count)}


def repository(big: int = 4) -> dict[str, bytes]:
    """The repository's files by name; BIG has `big` tensors."""
    states = {SMALL: tensors(2, 1), BIG: tensors(big, 2)}
    places = {name: file for file, state in states.items() for name in state}
    return {
        "config.json": b'{"model_type": "xgenmm"}',
        "model.safetensors.index.json": json.dumps({"weight_map": places}).encode(),
        "tokenizer.model": bytes(range(256)),
        "modeling_xgenmm.py": b"raise SystemExit('code from the hub was run')",
        "pytorch_model.bin": b"pickle",
        "README.md": b"# card",
        "extra/notes.json": b"{}",
        **{file: save(state) for file, state in states.items()},
    }


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `xgenmm` in a process of its own."""
    command = [sys.executable, "-m", "xgenmm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_complete(root: Path, hub: HubServer) -> None:
    """Assert that the downloaded folder verifies and has the checkpoint's files and no others."""
    folder = root / NAME
    assert {path.name for path in folder.iterdir()} == TAKEN | {"manifest.json"}
    for name in TAKEN:
        assert (folder / name).read_bytes() == hub.repos[REPO][name]
    assert verify(folder, {})
    assert not (root / f"{NAME}.partial").exists()
