"""The checkpoint folder of the video demo: sizes, files, and where its training starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from scripts.demo_model.checkpoint import CONFIG as IMAGE_CONFIG
from scripts.demo_model.checkpoint import DEMO, TILE, model_config
from xgenmm.config import RELEASES, VIDEO_128, TemporalConfig, TilingConfig
from xgenmm.models.temporal_encoder import GroupedTokenTuringMachine
from xgenmm.models.xgenmm import XGenMM

DEMO_VIDEO = DEMO.parent / "demo-video"

# Two layers instead of four and narrower feed-forward layers of the decoder, to fit 12 MB.
CONFIG = replace(
    IMAGE_CONFIG,
    decoder=replace(IMAGE_CONFIG.decoder, intermediate_size=192),
    frames_as_images=False,
    tiling=TilingConfig("pad", ()),
    text=RELEASES[VIDEO_128].text,
    temporal=TemporalConfig(num_layers=2),
)
_SHARED = (
    "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
    "generation_config.json",
)  # fmt: skip


def write_folder(folder: Path) -> None:
    """Write everything of the checkpoint but its weights; the tokenizer is that of the demo."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocessor = {
        "image_processor_type": "Blip3ImageProcessor",
        "do_resize": True,
        "resize_mode": "squash",
        "interpolation_mode": "bicubic",
        "size": [TILE, TILE],
        "image_mean": list(CONFIG.tiling.mean),
        "image_std": list(CONFIG.tiling.std),
    }
    files = {"config.json": model_config(CONFIG), "preprocessor_config.json": preprocessor}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in _SHARED:
        shutil.copyfile(DEMO / name, folder / name)


def initial_model() -> XGenMM:
    """The model at the start: the image demo's weights around a new temporal encoder.

    Feed-forward layers of the decoder keep the neurons with the largest weights.
    """
    model = XGenMM(CONFIG)
    weights = {
        name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()
    }
    for layer in range(CONFIG.decoder.num_layers):
        _prune(
            weights, f"vlm.lang_model.model.layers.{layer}.mlp.", CONFIG.decoder.intermediate_size
        )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(".temporal_encoder." in name for name in missing)
    nn.init.normal_(temporal_encoder(model).initial_memory, std=0.5)
    return model


def temporal_encoder(model: XGenMM) -> GroupedTokenTuringMachine:
    """The model's temporal encoder."""
    encoder = model.vlm.vision_tokenizer.temporal_encoder
    assert isinstance(encoder, GroupedTokenTuringMachine)
    return encoder


def _prune(weights: dict[str, torch.Tensor], prefix: str, size: int) -> None:
    """Keep the `size` neurons of a gated feed-forward layer with the largest weights."""
    gate, up = weights[f"{prefix}gate_up_proj.weight"].chunk(2)
    down = weights[f"{prefix}down_proj.weight"]
    importance = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = importance.topk(size).indices.sort().values
    weights[f"{prefix}gate_up_proj.weight"] = torch.cat([gate[kept], up[kept]])
    weights[f"{prefix}down_proj.weight"] = down[:, kept].contiguous()
