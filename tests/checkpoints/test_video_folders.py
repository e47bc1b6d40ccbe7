"""Which temporal encoder the folder of a video model gets, and which folders are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import checkpoint
from xgenmm.checkpoints.checks import check_sizes
from xgenmm.checkpoints.convert import convert
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config
from xgenmm.config import VIDEO_32, VIDEO_128, XGenMMConfig
from xgenmm.errors import CheckpointError
from xgenmm.models.xgenmm import XGenMM

ENCODER = "vlm.vision_tokenizer.temporal_encoder."


def released(folder: Path, kind: str) -> Path:
    """A tiny video checkpoint whose `config.json` says nothing of it, like the released ones."""
    checkpoint(folder, temporal=kind)
    config = json.loads((folder / "config.json").read_text())
    del config["temporal_encoder_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rename(folder: Path, pattern: str, replacement: str) -> None:
    """Rename tensors of the folder."""
    file = folder / "model.safetensors"
    parameters = load_file(file)
    save_file({re.sub(pattern, replacement, n): t for n, t in parameters.items()}, file)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> XGenMM:
    config = read_config(folder)
    check_sizes(config, folder)
    with torch.device("meta"):
        model = XGenMM(config)
    load_parameters(model, folder, device="cpu", dtype=dtype)
    return model


def temporal_kind(config: XGenMMConfig) -> str | None:
    return None if config.temporal is None else config.temporal.kind


@pytest.mark.parametrize("alias", ["temporal_encoder", "gttm", "ttm", "tts"])
@pytest.mark.parametrize("kind", ["gttm", "token_learner"])
def test_names_of_the_tensors_tell_the_temporal_encoder(
    tmp_path: Path, kind: str, alias: str
) -> None:
    folder = released(tmp_path / "mine", kind)
    expected = load_file(folder / "model.safetensors")
    rename(folder, re.escape(ENCODER), f"vlm.vision_tokenizer.{alias}.")
    model = load(folder)
    assert temporal_kind(model.config) == kind
    assert model.config.tiling.mode == "pad"
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert temporal_kind(load(convert(folder), torch.bfloat16).config) == kind


def test_name_of_the_folder_tells_the_temporal_encoder(tmp_path: Path) -> None:
    for name, kind in ((VIDEO_128, "gttm"), (VIDEO_32, "token_learner")):
        folder = released(tmp_path / name, kind)
        (folder / "model.safetensors").rename(tmp_path / "elsewhere")
        assert temporal_kind(read_config(folder)) == kind


@pytest.mark.parametrize("name", [VIDEO_32, "mine"])
def test_pooling_that_is_not_public_is_refused(tmp_path: Path, name: str) -> None:
    folder = released(tmp_path / name, "gttm")
    if name == "mine":
        parameters = load_file(folder / "model.safetensors")
        parameters[f"{ENCODER}final_output.norm.bias"] = torch.zeros(32)
        save_file(parameters, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ttm_unit\.\*.* in a way that is not public"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "field", "right"),
    [
        ("gttm", "memory_size", r"shape \[4, 4, 32\]"),
        ("gttm", "num_layers", "should be 4"),
        ("token_learner", "num_tokens", r"shape \[32, 64\]"),
    ],
)
def test_size_that_contradicts_the_tensors_is_named(
    tmp_path: Path, kind: str, field: str, right: str
) -> None:
    folder = released(tmp_path / "mine", kind)
    config = json.loads((folder / "config.json").read_text())
    config["temporal_encoder_config"] = {field: 5}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"temporal_encoder_config\.{field} is 5.*{right}"):
        load(folder)
