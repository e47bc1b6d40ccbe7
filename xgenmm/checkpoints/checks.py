"""What is checked about a checkpoint folder before a model is built from it."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from xgenmm.checkpoints.loading import stored_tensors
from xgenmm.checkpoints.registry import MEMORY_UNIT, TEMPORAL_ENCODER
from xgenmm.config import VIDEO_128, XGenMMConfig
from xgenmm.errors import CheckpointError, listed
from xgenmm.preprocessing.prompts import ASSISTANT, END, SYSTEM, USER
from xgenmm.preprocessing.tokenizer import Tokenizer

_CHAT_TOKENS = (SYSTEM, USER, ASSISTANT, END)
_VISION, _RESAMPLER = "vision_encoder_config.", "vision_tokenizer_config."
_TEMPORAL = "temporal_encoder_config."
_TOKEN_TURING_MACHINE = re.compile(
    re.escape(TEMPORAL_ENCODER)
    + r"(initial_memory|pos_emb\.|ttm_unit\.(process_layers|read_layer|write_layer)\.)"
)


class _Tower(NamedTuple):
    """The names of a vision tower's tensors."""

    patches: str
    positions: str
    layers: str
    mlp: str


_TENSORS = {
    "siglip": _Tower(
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers",
        "mlp.fc1.weight",
    ),
    "open_clip": _Tower(
        "conv1.weight", "positional_embedding", "transformer.resblocks", "mlp.c_fc.weight"
    ),
}


def read_tokenizer(folder: Path, config: XGenMMConfig) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder.

    Raises CheckpointError if a file is missing or broken, if it has ids that the model does not
    have, or if it lacks a special token of the model's prompts.
    """
    text = config.text
    try:
        tokenizer = Tokenizer.from_folder(folder, text.convention, config.additional_ids)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"tokenizer: {error}") from error
    needed = {*text.stop_tokens, *(_CHAT_TOKENS if text.prompt == "chat" else ())}
    missing = sorted(needed - tokenizer.specials.keys())
    if missing:
        raise CheckpointError(
            f"tokenizer: {folder}: neither added_tokens.json nor tokenizer_config.json has "
            f"{listed(missing)}, which prompts and answers need"
        )
    return tokenizer


def check_sizes(config: XGenMMConfig, folder: Path) -> None:
    """Compare the sizes in a configuration with the tensors of the checkpoint folder.

    Reads the files' headers only, and builds no module. Tensors that are missing are not reported
    here, but by `load_parameters`. Raises CheckpointError that names the field, its value and what
    would be right.
    """
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    _check_temporal_encoder(config, shapes, folder)
    for tensor, axis, length, field, value in _lengths(config):
        shape = shapes.get(tensor)
        if shape is not None and (len(shape) <= axis or shape[axis] != length):
            raise CheckpointError(
                f"model: {folder}: config.json: {field} is {value}, so dimension {axis} of "
                f"{tensor} should be {length}, but the *.safetensors files have shape {list(shape)}"
            )
    for layers, count, field in _layers(config):
        prefix = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
        found = {match[1] for name in shapes if (match := prefix.match(name))}
        if found and len(found) != count:
            raise CheckpointError(
                f"model: {folder}: config.json: {field} is {count}, but should be {len(found)}, "
                f"the number of {layers} in the *.safetensors files"
            )


def _check_temporal_encoder(config: XGenMMConfig, names: Collection[str], folder: Path) -> None:
    """Refuse a Token Turing Machine whose memory is not averaged but pooled by other weights.

    How a release of 32 tokens would do that is not public, nor are the names of its tensors.
    """
    if config.temporal is None or not any(name.startswith(MEMORY_UNIT) for name in names):
        return
    found = [name for name in names if name.startswith(TEMPORAL_ENCODER)]
    other = [name for name in found if not _TOKEN_TURING_MACHINE.match(name)]
    if config.temporal.kind != "gttm" or other:
        tensors = f"{MEMORY_UNIT}*" + (f" and {listed(other)}" if other else "")
        raise CheckpointError(
            f"model: {folder}: it has {tensors}, so its {config.clip_tokens} tokens of a clip are "
            "pooled from the memory of a Token Turing Machine in a way that is not public; "
            f"supported are {VIDEO_128} and checkpoints whose temporal encoder has final_output.* "
            "alone"
        )


def _lengths(config: XGenMMConfig) -> Iterator[tuple[str, int, int, str, object]]:
    """Yield (tensor, dimension, its length, field that the length follows from, field's value)."""
    text, vision, resampler = config.decoder, config.vision, config.resampler
    decoder = "vlm.lang_model.model"
    for tensor, axis, field, value in (
        (f"{decoder}.embed_tokens.weight", 0, "vocab_size", text.vocab_size),
        (f"{decoder}.embed_tokens.weight", 1, "hidden_size", text.hidden_size),
        (
            f"{decoder}.layers.0.mlp.down_proj.weight",
            1,
            "intermediate_size",
            text.intermediate_size,
        ),
    ):
        yield tensor, axis, value, f"text_config.{field}", value
    tower, names, class_token = "vlm.vision_encoder", _TENSORS[vision.tower], 0
    if vision.tower == "open_clip":
        class_token = 1
        yield f"{tower}.proj", 1, vision.output_dim, _VISION + "output_dim", vision.output_dim
    patches = f"{tower}.{names.patches}"
    yield patches, 0, vision.hidden_size, _VISION + "hidden_size", vision.hidden_size
    yield patches, 2, vision.patch_size, _VISION + "patch_size", vision.patch_size
    positions = vision.grid**2 + class_token
    yield f"{tower}.{names.positions}", 0, positions, _VISION + "image_size", vision.image_size
    mlp, inner = f"{tower}.{names.layers}.0.{names.mlp}", vision.intermediate_size
    yield mlp, 0, inner, _VISION + "intermediate_size", inner
    latents, heads, width = resampler.num_latents, resampler.num_heads, resampler.head_dim
    yield "vlm.vision_tokenizer.latents", 0, latents, _RESAMPLER + "num_latents", latents
    query = "vlm.vision_tokenizer.layers.0.0.to_q.weight"
    yield query, 0, heads * width, _RESAMPLER + "num_heads times head_dim", f"{heads} * {width}"
    if config.temporal is not None:
        memory, tokens = config.temporal.memory_size, config.temporal.num_tokens
        yield f"{TEMPORAL_ENCODER}initial_memory", 1, memory, _TEMPORAL + "memory_size", memory
        pooling = f"{TEMPORAL_ENCODER}final_output.mlp.3.weight"
        yield pooling, 0, tokens, _TEMPORAL + "num_tokens", tokens


def _layers(config: XGenMMConfig) -> Iterator[tuple[str, int, str]]:
    """Yield (prefix of the layers' tensors, number of layers, field that states it)."""
    vision = config.vision
    layers = _TENSORS[vision.tower].layers
    yield "vlm.lang_model.model.layers", config.decoder.num_layers, "text_config.num_hidden_layers"
    yield f"vlm.vision_encoder.{layers}", vision.num_layers, _VISION + "num_hidden_layers"
    yield "vlm.vision_tokenizer.layers", config.resampler.depth, _RESAMPLER + "depth"
    if config.temporal is not None:
        yield f"{MEMORY_UNIT}process_layers", config.temporal.num_layers, _TEMPORAL + "num_layers"
