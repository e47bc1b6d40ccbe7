"""Comparison of this implementation with golden data: what the original implementation computed.

A golden folder has a `cases.json` and, for a model, also `model.safetensors` (random weights under
the released names), `activations.safetensors` (float32, computed on a CPU) and images.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from safetensors.torch import load_file

from xgenmm.config import (
    DecoderConfig,
    ResamplerConfig,
    TextConfig,
    TilingConfig,
    VisionConfig,
    XGenMMConfig,
)
from xgenmm.engine.reference import generate
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.files import read_json_object
from xgenmm.models.attention import GrowingCache
from xgenmm.models.image_features import normalize, padding_mask
from xgenmm.models.vision import fuse_attention
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage, tile_image
from xgenmm.preprocessing.tokenizer import Tokenizer
from xgenmm.preprocessing.tokenizer_files import Convention

DESCRIPTION = """\
Compare this implementation with golden data: what the original implementation computed. A line for
each case gives the largest difference of each stage; the last line counts the cases. The exit
status is 1 if a case fails.

    xgenmm parity golden/v15_anyres
    xgenmm parity golden/* --tokenizer weights/xgen-mm-phi3-mini-base-r-v1.5
"""

TOLERANCES: Mapping[str, float] = {
    "tiles": 1e-6,
    "mask": 0.0,
    "features": 1e-4,
    "vision_tokens": 1e-4,
    "inputs_embeds": 1e-4,
    "logits": 1e-3,
    "ids": 0.0,  # number of positions that differ
}


@dataclass
class Case:
    """A golden case and the largest difference of each stage from what was computed here."""

    name: str
    differences: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether anything was compared and every stage is within its tolerance."""
        within = (value <= TOLERANCES[_kind(stage)] for stage, value in self.differences.items())
        return bool(self.differences) and all(within)

    def compare(self, stage: str, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Record the largest difference; infinite if shapes differ or a value is NaN."""
        largest = float("inf")
        if expected.shape == found.shape:
            differences = (expected.float() - found.float()).abs()
            largest = differences.max().item() if differences.numel() else 0.0
        if math.isnan(largest):
            largest = float("inf")
        self.differences[stage] = max(largest, self.differences.get(stage, 0.0))

    def compare_ids(self, stage: str, expected: Sequence[int], found: Sequence[int]) -> None:
        """Record how many positions differ, missing ones included."""
        pairs = zip(expected, found, strict=False)
        count = sum(a != b for a, b in pairs) + abs(len(expected) - len(found))
        self.differences[stage] = float(count)

    def __str__(self) -> str:
        parts = [
            f"{stage} {value:.0f} differ" if _kind(stage) == "ids" else f"{stage} {value:.1e}"
            for stage, value in self.differences.items()
        ]
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {', '.join(parts) or 'nothing'}"


def _kind(stage: str) -> str:
    return "ids" if stage.endswith("ids") else stage.removesuffix("_pad")


def check_folder(folder: Path, tokenizer: Path | None) -> Iterator[Case]:
    """Compare every case of a golden folder.

    Raises:
        ValueError: it is not a golden folder, or has token ids and `tokenizer` is None.
        OSError: a file is missing or cannot be read.
    """
    try:
        golden = read_json_object(folder / "cases.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a golden folder ({error})") from error
    if "vision" in golden:
        yield from _check_model(folder, golden)
    elif tokenizer is None:
        raise ValueError(f"{folder} has token ids: give tokenizer files with --tokenizer FOLDER")
    else:
        yield from _check_tokens(folder, golden, tokenizer)


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
            mode="anyres" if golden["image_aspect_ratio"] == "anyres" else "squash",
            grids=tuple((w, h) for w, h in golden.get("anyres_grids", ())),
            mean=tuple(golden["image_mean"]),
            std=tuple(golden["image_std"]),
        ),
        text=TextConfig(additional=tuple(sorted(special, key=special.__getitem__))),
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


@torch.inference_mode()
def _check_model(folder: Path, golden: Mapping[str, Any]) -> Iterator[Case]:
    model = golden_model(folder, golden)
    activations = load_file(folder / "activations.safetensors")
    for description in golden["cases"]:
        yield _check_case(model, golden, folder, description, activations)


def _check_case(
    model: XGenMM,
    golden: Mapping[str, Any],
    folder: Path,
    description: Mapping[str, Any],
    activations: Mapping[str, torch.Tensor],
) -> Case:
    name = description["name"]
    case = Case(f"{folder.name}/{name}", {})

    def compare(key: str, stage: str, found: torch.Tensor) -> None:
        if f"{name}.{key}" in activations:
            case.compare(stage, activations[f"{name}.{key}"], found)

    images = [read_image(folder / file) for file in description["images"]]
    prompt = golden_prompt(golden, description["input_ids"])
    vision_tokens = _check_vision(model, images, prompt, compare)
    embeds = model.merge_multimodal_embeddings(prompt, vision_tokens)
    compare("inputs_embeds", "inputs_embeds", embeds)
    compare("logits", "logits", all_logits(model, embeds))
    # The golden ids say how many tokens to generate; an end token does not stop greedy decoding.
    end_ids = frozenset({golden["text"]["eos_token_id"]})
    for stage, params in golden_generations(description):
        found = list(generate(model, embeds, params, params.max_new_tokens, end_ids))
        case.compare_ids(stage, description[stage], found)
    return case


def _check_vision(
    model: XGenMM,
    images: Sequence[Image.Image],
    prompt: Prompt,
    compare: Callable[[str, str, torch.Tensor], None],
) -> list[torch.Tensor]:
    """Compare tiles, masks, features and vision tokens; return the vision tokens."""
    config = model.config
    tile_size = config.vision.image_size
    tiles = [tile_image(image, config.tiling, tile_size) for image in images]
    features = model.features(tiles)
    vision_tokens = model.vision_tokens(tiles, features, prompt)
    pixels = _normalized(tiles, config.tiling)
    for i, one in enumerate(tiles):
        compare(f"tiles.{i}", "tiles", pixels[i])
        mask = padding_mask(one.columns, one.rows, one.image_size, config.vision.grid)
        compare(f"mask.{i}", "mask", mask)
        compare(f"features.{i}", "features", features[i])
        compare(f"vision_tokens.{i}", "vision_tokens", vision_tokens[i])
    if tiles and config.tiling.mode != "anyres":  # one tile an image, stored as one batch
        padding = replace(config.tiling, mode="pad")
        padded = [tile_image(image, padding, tile_size) for image in images]
        compare("pixel_values", "tiles", torch.cat(pixels))
        compare("pixel_values_pad", "tiles_pad", torch.cat(_normalized(padded, padding)))
        compare("features", "features", torch.cat(features))
        compare("vision_tokens", "vision_tokens", torch.stack(vision_tokens))
    return vision_tokens


def _normalized(tiles: Sequence[TiledImage], tiling: TilingConfig) -> list[torch.Tensor]:
    return [normalize(torch.from_numpy(one.pixels), tiling, torch.float32) for one in tiles]


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


@torch.inference_mode()
def all_logits(model: XGenMM, embeds: torch.Tensor) -> torch.Tensor:
    """Return all logits of a prompt: [length, width] -> float32 [length, vocab]."""
    positions = torch.arange(embeds.shape[0], device=embeds.device)[None]
    cache = GrowingCache(model.config.decoder.window_keys)
    return model.logits(model.decoder(embeds[None], positions, cache))[0]


def _check_tokens(folder: Path, golden: Mapping[str, Any], tokenizer: Path) -> Iterator[Case]:
    extra = XGenMMConfig().additional_ids
    tokens = {c: Tokenizer.from_folder(tokenizer, c, extra) for c in get_args(Convention)}
    for number, description in enumerate(golden["cases"]):
        case = Case(f"{folder.name}/{description['kind']}-{number}", {})
        found = tokens[description["tokenizer"]].encode(description["text"])
        case.compare_ids("ids", description["ids"], found)
        yield case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xgenmm parity`."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a folder with cases.json"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="tokenizer files, for golden folders of token ids",
    )


def run(options: argparse.Namespace) -> int:
    """Run `xgenmm parity`; return the exit status."""
    passed = failed = 0
    for folder in options.folders:
        try:
            for case in check_folder(folder, options.tokenizer):
                print(case, flush=True)
                passed, failed = passed + case.passed, failed + (not case.passed)
        except (OSError, ValueError) as error:
            print(f"FAIL {error}", flush=True)
            failed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0
