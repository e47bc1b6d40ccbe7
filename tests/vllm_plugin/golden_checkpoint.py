"""The golden model as a checkpoint folder that vLLM can run on a CPU.

vLLM's CPU attention has no heads narrower than 32 and the golden model's are 16 wide, so its heads
are widened without changing what they compute.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from xgenmm.vllm_plugin import ARCHITECTURE

WIDENED = 2  # times
_ATTENTION = ".self_attn."


def write(golden: Path, folder: Path) -> Path:
    """Write the golden model in the folder `golden` as a checkpoint, without a tokenizer."""
    cases = json.loads((golden / "cases.json").read_text())
    text, resampler, special = cases["text"], cases["sampler"], cases["special_token_ids"]
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "xgenmm",
        "vision_encoder_config": cases["vision"],
        "vision_tokenizer_config": {
            "num_latents": resampler["num_latents"],
            "depth": resampler["depth"],
            "num_heads": resampler["heads"],
            "head_dim": resampler["dim_head"],
        },
        "text_config": {
            **text,
            "initial_tokenizer_len": cases["initial_tokenizer_len"],
            "additional_tokens": len(special),
        },
    }
    tile = cases["vision"]["image_size"]
    preprocessor = {"grids": cases.get("anyres_grids"), "size": [tile, tile]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    parameters = load_file(golden / "model.safetensors")
    save_file(_widened(parameters, text), folder / "model.safetensors")
    return folder


def head_dim(golden: Path) -> int:
    """Width of the heads that `write` makes."""
    text = json.loads((golden / "cases.json").read_text())["text"]
    return WIDENED * int(text["hidden_size"]) // int(text["num_attention_heads"])


def _widened(
    parameters: Mapping[str, torch.Tensor], text: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Each head with zeros between its dimensions, so that scores and outputs stay the same.

    Pair i of w dimensions turns with the frequency theta^(-2i/w), which is that of pair 2i of 2w
    dimensions; and a score is divided by the root of the width, so queries grow by that of 2.
    """
    heads = text["num_attention_heads"]
    width = text["hidden_size"] // heads
    places = torch.arange(width) * WIDENED  # also of the second half: it starts at `width`
    widened = {}
    for name, tensor in parameters.items():
        if name.endswith(f"{_ATTENTION}qkv_proj.weight"):
            wide = tensor.new_zeros(3, heads, WIDENED * width, tensor.shape[1])
            wide[:, :, places] = tensor.unflatten(0, (3, heads, width))
            wide[0] *= math.sqrt(WIDENED)
            tensor = wide.flatten(0, 2)
        elif name.endswith(f"{_ATTENTION}o_proj.weight"):
            wide = tensor.new_zeros(tensor.shape[0], heads, WIDENED * width)
            wide[:, :, places] = tensor.unflatten(1, (heads, width))
            tensor = wide.flatten(1)
        widened[name] = tensor.contiguous()
    return widened
