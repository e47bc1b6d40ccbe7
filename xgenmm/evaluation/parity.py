"""Comparison of this implementation with golden data: what the original implementation computed.

A golden folder has a `cases.json` and, for a model, also `model.safetensors` (random weights under
the released names), `activations.safetensors` (float32, computed on a CPU) and images.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
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
from xgenmm.models.image_features import normalize, padding_mask
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

    xgenmm parity tests/golden/v15_anyres
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
    vision, text, resampler = golden["vision"], golden["text"], golden["sampler"]
    if "width" in vision:  # open_clip's own names
        tower = VisionConfig(
            tower="open_clip",
            hidden_size=vision["width"],
            intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
            num_layers=vision["layers"],
            num_heads=vision["heads"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            output_dim=vision["output_dim"],
        )
    else:
        tower = VisionConfig(
            tower="siglip",
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
        )
    text_tokens = resampler.get("text_tokens", 0)
    special = golden["special_token_ids"]
    return XGenMMConfig(
        vision=tower,
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
    name, config = description["name"], model.config
    case = Case(f"{folder.name}/{name}", {})
    tile = config.vision.image_size
    images = [read_image(folder / file) for file in description["images"]]
    tiles = [tile_image(image, config.tiling, tile) for image in images]
    prompt = golden_prompt(golden, description["input_ids"])
    features = model.features(tiles)
    vision_tokens = model.vision_tokens(tiles, features, prompt)
    embeds = model.merge_multimodal_embeddings(prompt, vision_tokens)

    def compare(key: str, stage: str, found: torch.Tensor) -> None:
        if f"{name}.{key}" in activations:
            case.compare(stage, activations[f"{name}.{key}"], found)

    def normalised(these: Sequence[TiledImage], tiling: TilingConfig) -> list[torch.Tensor]:
        return [normalize(torch.from_numpy(one.pixels), tiling, torch.float32) for one in these]

    for i, (pixels, one) in enumerate(zip(normalised(tiles, config.tiling), tiles, strict=True)):
        compare(f"tiles.{i}", "tiles", pixels)
        mask = padding_mask(one.columns, one.rows, one.image_size, config.vision.grid)
        compare(f"mask.{i}", "mask", mask)
        compare(f"features.{i}", "features", features[i])
        compare(f"vision_tokens.{i}", "vision_tokens", vision_tokens[i])
    if tiles and config.tiling.mode != "anyres":  # one tile an image, stored as one batch
        padded = replace(config.tiling, mode="pad")
        squares = [tile_image(image, padded, tile) for image in images]
        compare("pixel_values", "tiles", torch.cat(normalised(tiles, config.tiling)))
        compare("pixel_values_pad", "tiles_pad", torch.cat(normalised(squares, padded)))
        compare("features", "features", torch.cat(features))
        compare("vision_tokens", "vision_tokens", torch.stack(vision_tokens))
    compare("inputs_embeds", "inputs_embeds", embeds)
    compare("logits", "logits", all_logits(model, embeds))

    # The golden ids say how many tokens to generate; an end token does not stop greedy decoding.
    end_ids = frozenset({golden["text"]["eos_token_id"]})
    for stage, beams, penalty in (
        ("greedy_ids", 1, 1.0),
        ("greedy_repetition_penalty_2_ids", 1, 2.0),
        ("beam3_ids", 3, 1.0),
    ):
        if stage in description:
            expected = description[stage]
            params = SamplingParams(
                max_new_tokens=len(expected), num_beams=beams, repetition_penalty=penalty
            )
            found = list(generate(model, embeds, params, len(expected), end_ids))
            case.compare_ids(stage, expected, found)
    return case


@torch.inference_mode()
def all_logits(model: XGenMM, embeds: torch.Tensor) -> torch.Tensor:
    """Return all logits of a prompt: [length, width] -> float32 [length, vocab]."""
    length = embeds.shape[0]
    positions = torch.arange(length, device=embeds.device)[None]
    return model.logits(model.decoder(embeds[None], positions, model.cache(1, length), length))[0]


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
