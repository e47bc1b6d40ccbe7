"""Comparison of this implementation with golden data: what the original implementation computed.

A golden folder has a `cases.json` and, for a model, also `model.safetensors` (random weights under
the released names), `activations.safetensors` (float32, computed on a CPU) and images.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from safetensors.torch import load_file

from xgenmm.config import TilingConfig, XGenMMConfig
from xgenmm.engine.reference import generate
from xgenmm.evaluation.case import Case
from xgenmm.evaluation.finetuning_parity import check_finetuning, is_finetuning
from xgenmm.evaluation.golden import (
    golden_generations,
    golden_images,
    golden_model,
    golden_prompt,
)
from xgenmm.files import read_json_object
from xgenmm.models.attention import GrowingCache
from xgenmm.models.image_features import normalize, padding_mask
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.frame_indices import EXACT_TOTAL, frame_indices
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
    xgenmm parity finetune/golden --model golden/v15_anyres --tokenizer weights/NAME

Fine-tuning cases (losses, gradients and optimizer steps of the original training) name their model
by its hash. It is looked for in all folders given, and in a folder `golden` beside or above them.
"""


def check_folder(
    folder: Path, tokenizer: Path | None, models: Sequence[Path] = ()
) -> Iterator[Case]:
    """Compare every case of a golden folder.

    Args:
        tokenizer: a folder of tokenizer files, for cases with texts.
        models: golden folders, of which one has the model of a folder of fine-tuning cases.

    Raises:
        ValueError: it is not a golden folder, its model is not found, or it has texts and
            `tokenizer` is None.
        OSError: a file is missing or cannot be read.
    """
    try:
        golden = read_json_object(folder / "cases.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a golden folder ({error})") from error
    if is_finetuning(golden):
        yield from check_finetuning(folder, golden, tokenizer, models)
    elif "vision" in golden:
        yield from _check_model(folder, golden)
    elif tokenizer is None:
        raise ValueError(f"{folder} has token ids: give tokenizer files with --tokenizer FOLDER")
    else:
        yield from _check_tokens(folder, golden, tokenizer)


@torch.inference_mode()
def _check_model(folder: Path, golden: Mapping[str, Any]) -> Iterator[Case]:
    model = golden_model(folder, golden)
    activations = load_file(folder / "activations.safetensors")
    for description in golden["cases"]:
        yield _check_case(model, golden, folder, description, activations)
    if "frame_sampling" in golden:
        yield _check_frame_indices(folder, golden["frame_sampling"])


def _check_frame_indices(folder: Path, table: Sequence[Mapping[str, Any]]) -> Case:
    """Compare the indices of the frames to take, but for clips too short for the original."""
    case, expected, found = Case(f"{folder.name}/frame_sampling"), list[int](), list[int]()
    for row in table:
        total, count = row["total"], row["num_frames"]
        if total >= max(EXACT_TOTAL, 2 * count):
            expected += row["indices"]
            found += frame_indices(total, count)
    case.compare_ids("frame_ids", expected, found)
    return case


def _check_case(
    model: XGenMM,
    golden: Mapping[str, Any],
    folder: Path,
    description: Mapping[str, Any],
    activations: Mapping[str, torch.Tensor],
) -> Case:
    name = description["name"]
    case = Case(f"{folder.name}/{name}")

    def compare(key: str, stage: str, found: torch.Tensor) -> None:
        if f"{name}.{key}" in activations:
            case.compare(stage, activations[f"{name}.{key}"], found)

    images = golden_images(folder, description)
    prompt = golden_prompt(golden, description["input_ids"])
    if model.config.temporal is not None:
        vision_tokens = _check_clip(model, images, compare)
    else:
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


def _check_clip(
    model: XGenMM,
    frames: Sequence[Image.Image],
    compare: Callable[[str, str, torch.Tensor], None],
) -> list[torch.Tensor]:
    """Compare all stages of a clip's frames up to its vision tokens; return these."""
    tiling, tile_size = model.config.tiling, model.config.vision.image_size
    tiles = [tile_image(frame, tiling, tile_size) for frame in frames]
    squashing = replace(tiling, mode="squash")
    squashed = [tile_image(frame, squashing, tile_size) for frame in frames]
    compare("tiles.0", "tiles", torch.cat(_normalized(tiles, tiling)))
    compare("tiles_squash.0", "tiles_squash", torch.cat(_normalized(squashed, squashing)))
    features = model.features(tiles)
    compare("features.0", "features", torch.cat(features))
    latents = torch.stack(model.frame_latents(features))
    compare("latents.0", "latents", latents)
    assert model.vlm.vision_tokenizer.temporal_encoder is not None
    compare("temporal.0", "temporal", model.vlm.vision_tokenizer.temporal_encoder(latents))
    vision_tokens = model.vision_tokens(tiles, features)
    compare("vision_tokens.0", "vision_tokens", vision_tokens[0])
    return vision_tokens


def _normalized(tiles: Sequence[TiledImage], tiling: TilingConfig) -> list[torch.Tensor]:
    return [normalize(torch.from_numpy(one.pixels), tiling, torch.float32) for one in tiles]


@torch.inference_mode()
def all_logits(model: XGenMM, embeds: torch.Tensor) -> torch.Tensor:
    """Return all logits of a prompt: [length, width] -> float32 [length, vocab]."""
    positions = torch.arange(embeds.shape[0], device=embeds.device)[None]
    cache = GrowingCache(model.config.decoder.window_keys)
    return model.logits(model.decoder(embeds[None], positions, cache))[0]


def _check_tokens(folder: Path, golden: Mapping[str, Any], tokenizer: Path) -> Iterator[Case]:
    extra = XGenMMConfig().additional_ids
    used = {description["tokenizer"] for description in golden["cases"]}
    conventions = [convention for convention in get_args(Convention) if convention in used]
    tokens = {c: Tokenizer.from_folder(tokenizer, c, extra) for c in conventions}
    for number, description in enumerate(golden["cases"]):
        case = Case(f"{folder.name}/{description['kind']}-{number}")
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
        help="tokenizer files, for golden folders of token ids or labels",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the golden folder with the model of fine-tuning cases",
    )


def run(options: argparse.Namespace) -> int:
    """Run `xgenmm parity`; return the exit status."""
    passed = failed = 0
    models = [*([options.model] if options.model else []), *options.folders]
    for folder in options.folders:
        try:
            for case in check_folder(folder, options.tokenizer, models):
                print(case, flush=True)
                passed, failed = passed + case.passed, failed + (not case.passed)
        except (OSError, ValueError) as error:
            print(f"FAIL {error}", flush=True)
            failed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0
