"""Golden folders: the model, prompts and settings that their `cases.json` describes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from xgenmm.config import (
    DecoderConfig,
    ResamplerConfig,
    TemporalConfig,
    TextConfig,
    TilingConfig,
    TilingMode,
    VisionConfig,
    XGenMMConfig,
)
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.models.vision import fuse_attention
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import Prompt

_TILING_MODES: dict[str, TilingMode] = {
    "anyres": "anyres",
    "none": "squash",
    "pad": "pad",
}


def golden_config(golden: Mapping[str, Any]) -> XGenMMConfig:
    """Return the configuration of a golden model, from its `cases.json`."""
    text, resampler = golden["text"], golden["sampler"]
    text_tokens = resampler.get("text_tokens", 0)
    special = golden["special_token_ids"]
    return XGenMMConfig(
        vision=_vision_config(golden["vision"]),
        resampler=ResamplerConfig(
            num_latents=resampler["num_latents"],
            depth=resampler["depth"],
            num_heads=resampler["heads"],
            head_dim=resampler["dim_head"],
            text_tokens=text_tokens,
            masked=not text_tokens,
        ),
        decoder=DecoderConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            max_positions=text["max_position_embeddings"],
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=text["rope_theta"],
            sliding_window=text["sliding_window"],
            initial_vocab=golden["initial_tokenizer_len"],
            additional_tokens=len(special),
        ),
        tiling=TilingConfig(
            mode=_TILING_MODES[golden["image_aspect_ratio"]],
            grids=tuple((w, h) for w, h in golden.get("anyres_grids", ())),
            mean=tuple(golden["image_mean"]),
            std=tuple(golden["image_std"]),
        ),
        text=TextConfig(additional=tuple(sorted(special, key=special.__getitem__))),
        temporal=_temporal_config(golden["temporal"]) if "temporal" in golden else None,
    )


def _temporal_config(temporal: Mapping[str, Any]) -> TemporalConfig:
    if temporal["kind"] == "tl":
        return TemporalConfig("token_learner", num_tokens=temporal["num_tokens"])
    return TemporalConfig(
        "gttm",
        memory_size=temporal["memory_size_per_group"],
        num_layers=temporal["num_layers"],
        num_heads=temporal["num_heads"],
    )


def _vision_config(vision: Mapping[str, Any]) -> VisionConfig:
    if "width" in vision:  # open_clip's own names
        return VisionConfig(
            tower="open_clip",
            hidden_size=vision["width"],
            intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
            num_layers=vision["layers"],
            num_heads=vision["heads"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            output_dim=vision["output_dim"],
        )
    return VisionConfig(
        tower="siglip",
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
    )


def golden_prompt(golden: Mapping[str, Any], ids: Sequence[int]) -> Prompt:
    """Return the prompt of token ids: a span is `<image>` and the placeholders after it."""
    image = golden["special_token_ids"]["<image>"]
    placeholder = golden["special_token_ids"]["<image placeholder>"]
    spans = []
    for start in (i for i, token in enumerate(ids) if token == image):
        end = start + 1
        while end < len(ids) and ids[end] == placeholder:
            end += 1
        spans.append((start, end - start))
    return Prompt(tuple(ids), tuple(spans))


def golden_model(folder: Path, golden: Mapping[str, Any]) -> XGenMM:
    """Return the golden model with its weights, float32 on the CPU."""
    with torch.device("meta"):
        model = XGenMM(golden_config(golden))
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    fuse_attention(model.vlm.vision_encoder)
    return model.eval().requires_grad_(False)


def golden_images(folder: Path, description: Mapping[str, Any]) -> list[Image.Image]:
    """Read the images of a case, or the frames of its clip."""
    files = description["videos"][0] if "videos" in description else description["images"]
    return [read_image(folder / file) for file in files]


def golden_generations(
    description: Mapping[str, Any],
) -> Iterator[tuple[str, SamplingParams]]:
    """Yield the key of each generated answer of a case and the parameters it was generated with."""
    for stage, beams, penalty in (
        ("greedy_ids", 1, 1.0),
        ("greedy_repetition_penalty_2_ids", 1, 2.0),
        ("beam3_ids", 3, 1.0),
    ):
        if stage in description:
            length = len(description[stage])
            yield stage, SamplingParams(length, num_beams=beams, repetition_penalty=penalty)
