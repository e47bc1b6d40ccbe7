"""The golden model as a checkpoint folder that vLLM can run on a CPU.

vLLM's CPU attention needs heads of at least 32 dimensions and the golden model's have 16, so its
heads are widened without changing their result.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from xgenmm.vllm_plugin.configuration import ARCHITECTURE

WIDTH_FACTOR = 2
_ATTENTION = ".self_attn."


def write(golden: Path, folder: Path) -> Path:
    """Write the golden model of the folder `golden` as a checkpoint without a tokenizer."""
    cases = json.loads((golden / "cases.json").read_text())
    text, resampler = cases["text"], cases["sampler"]
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
            "additional_tokens": len(cases["special_token_ids"]),
        },
    }
    tile = cases["vision"]["image_size"]
    preprocessor = {"grids": cases.get("anyres_grids"), "size": [tile, tile]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    parameters = load_file(golden / "model.safetensors")
    save_file(_widen_heads(parameters, text), folder / "model.safetensors")
    return folder


def head_dim(golden: Path) -> int:
    """The width of the heads in a checkpoint from `write`."""
    text = json.loads((golden / "cases.json").read_text())["text"]
    return WIDTH_FACTOR * int(text["hidden_size"]) // int(text["num_attention_heads"])


def _widen_heads(
    parameters: Mapping[str, torch.Tensor], text: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Put zeros between the dimensions of each head, so that scores and outputs stay the same.

    Rotary embedding turns pair i of w dimensions with the frequency theta^(-2i/w), which is that of
    pair 2i of 2w dimensions. Scores are divided by the square root of the width, so queries are
    multiplied by the square root of 2.
    """
    heads = text["num_attention_heads"]
    width = text["hidden_size"] // heads
    # Also right for the second half of the dimensions, which now starts at `width`.
    dimensions = torch.arange(width) * WIDTH_FACTOR
    widened = {}
    for name, tensor in parameters.items():
        if name.endswith(f"{_ATTENTION}qkv_proj.weight"):
            wide = tensor.new_zeros(3, heads, WIDTH_FACTOR * width, tensor.shape[1])
            wide[:, :, dimensions] = tensor.unflatten(0, (3, heads, width))
            wide[0] *= math.sqrt(WIDTH_FACTOR)
            tensor = wide.flatten(0, 2)
        elif name.endswith(f"{_ATTENTION}o_proj.weight"):
            wide = tensor.new_zeros(tensor.shape[0], heads, WIDTH_FACTOR * width)
            wide[:, :, dimensions] = tensor.unflatten(1, (heads, width))
            tensor = wide.flatten(1)
        widened[name] = tensor.contiguous()
    return widened
