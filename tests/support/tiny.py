"""Tiny checkpoints with random weights, in the released layout of each family."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.paths import DEMO
from xgenmm.checkpoints.registry import read_config
from xgenmm.models.xgenmm import XGenMM

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
ARCHITECTURES = {
    "v1.5": "XGenMMModelForConditionalGeneration",
    "v1": "Blip3ModelForConditionalGeneration",
}


def checkpoint(
    folder: Path,
    version: str = "v1.5",
    *,
    base: bool = False,
    temporal: str | None = None,
    seed: int = 3,
) -> Path:
    """Write a checkpoint folder that uses the demo's tokenizer, and return it.

    base: a base model, with few-shot prompts and one tile per image, not an instruct model.
    temporal: kind of the temporal encoder of a video model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder)
    demo = json.loads((DEMO / "config.json").read_text())["text_config"]
    tile_size = 28
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[version]],
        "vision_encoder_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": tile_size,
            "patch_size": 14,
            "output_dim": 16 if version == "v1" else 0,
        },
        "vision_tokenizer_config": {"num_latents": 4, "depth": 1, "num_heads": 2, "head_dim": 8},
        "text_config": {
            "vocab_size": demo["vocab_size"],
            "initial_tokenizer_len": demo["initial_tokenizer_len"],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "sliding_window": 63,
        },
    }
    if temporal is not None:
        config["temporal_encoder_config"] = {"kind": temporal}
    canvases = [
        [tile_size, 2 * tile_size],
        [2 * tile_size, tile_size],
        [2 * tile_size, 2 * tile_size],
    ]
    preprocessor = {"grids": None if base else canvases, "size": [tile_size, tile_size]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    torch.manual_seed(seed)
    parameters = XGenMM(read_config(folder)).state_dict()
    parameters["vlm.vision_tokenizer.projection.weight"] *= 20  # so that images affect the output
    save_file(parameters, folder / "model.safetensors")
    return folder
