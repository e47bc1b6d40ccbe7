"""The checkpoint whose answers only end from outside."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.paths import DEMO


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
