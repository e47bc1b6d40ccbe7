"""What a checkpoint's `config.json` and `preprocessor_config.json` say -> its `XGenMMConfig`.

Reads no files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from xgenmm.config import (
    INTERLEAVE,
    RELEASES,
    VIDEO_128,
    DecoderConfig,
    ResamplerConfig,
    TemporalConfig,
    TextConfig,
    TilingConfig,
    VisionConfig,
    XGenMMConfig,
)
from xgenmm.errors import explain, printable


class ConfigError(ValueError):
    """A checkpoint's configuration is incomplete or contradicts itself."""


class _ConfigFile(BaseModel, strict=True):
    """What is read of `config.json`. The sections' fields are those of the dataclasses above."""

    architectures: list[str] | None = None
    model_type: str | None = None
    demo: bool | None = None
    vision_encoder_config: dict[str, Any] | None = None
    vision_tokenizer_config: dict[str, Any] | None = None
    temporal_encoder_config: dict[str, Any] | None = None  # not in released files
    text_config: dict[str, Any] | None = None


def from_json(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], release: str | None = None
) -> XGenMMConfig:
    """Return the configuration for a checkpoint's `config.json` and `preprocessor_config.json`.

    Released files state few sizes (defaults of their remote code supply the rest), so the release's
    entry in RELEASES is the base. Without `release`, the base follows from the architecture and
    from whether the preprocessor has grids. Sizes that the files do state take precedence; the demo
    checkpoint, which has the same layout but is smaller, states those that differ. No released file
    tells a video model from an image model: without `release`, only `temporal_encoder_config` does.

    Raises:
        ConfigError: the architecture is unknown, or a value is impossible or contradicts another;
            names the file, the field, the value and what would be right.
    """
    try:
        file = _ConfigFile.model_validate(dict(config))
    except ValidationError as error:
        raise ConfigError(f"config.json: {explain(error)}") from error
    base = RELEASES[release] if release in RELEASES else _family(file, preprocessor)
    tiling = {key: preprocessor.get(key) for key in ("image_mean", "image_std")}
    if base.tiling.mode == "anyres":
        tiling["grids"] = preprocessor.get("grids")
    parsed = dataclasses.replace(
        base,
        vision=_override(base.vision, "vision_encoder_config", file.vision_encoder_config),
        resampler=_override(
            base.resampler, "vision_tokenizer_config", file.vision_tokenizer_config
        ),
        decoder=_override(base.decoder, "text_config", file.text_config),
        temporal=base.temporal
        and _override(base.temporal, "temporal_encoder_config", file.temporal_encoder_config),
        tiling=_override(base.tiling, "", tiling),
        demo=bool(file.demo),
    )
    _check_decoder(parsed.decoder, file.text_config or {})
    _check_tiling(parsed)
    _check_temporal(parsed)
    return parsed


# The files' names of the fields that are named differently here.
_NAMES = {
    "vision_encoder_config": {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    },
    "vision_tokenizer_config": {},
    "temporal_encoder_config": {},
    "text_config": {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_positions",
        "initial_tokenizer_len": "initial_vocab",
    },
    "": {"image_mean": "mean", "image_std": "std"},  # preprocessor_config.json has no sections
}


def _family(config: _ConfigFile, preprocessor: Mapping[str, Any]) -> XGenMMConfig:
    architecture = " ".join(config.architectures or [str(config.model_type)]).lower()
    anyres = preprocessor.get("grids") is not None
    if "xgenmm" in architecture and config.temporal_encoder_config is not None:
        name = VIDEO_128
    elif "xgenmm" in architecture:
        name = INTERLEAVE if anyres else "xgen-mm-phi3-mini-base-r-v1.5"
    elif "blip" in architecture:
        name = f"xgen-mm-phi3-mini-{'instruct' if anyres else 'base'}-r-v1"
    else:
        raise ConfigError(
            f"config.json: architectures: {printable(architecture)!r} is not an xGen-MM model; "
            "expected XGenMMModelForConditionalGeneration or Blip3ModelForConditionalGeneration"
        )
    return RELEASES[name]


ConfigT = TypeVar(
    "ConfigT", VisionConfig, ResamplerConfig, TemporalConfig, DecoderConfig, TilingConfig
)


def _override(base: ConfigT, section: str, stated: Mapping[str, Any] | None) -> ConfigT:
    """Return `base` with the values in `stated`; keys that are not fields are ignored."""
    fields = {f.name for f in dataclasses.fields(base)}
    names = _NAMES[section]
    stated = {names.get(key, key): value for key, value in (stated or {}).items()}
    changes = {key: value for key, value in stated.items() if key in fields and value is not None}
    try:
        return dataclasses.replace(base, **changes)
    except ValidationError as error:
        file = "config.json" if section else "preprocessor_config.json"
        in_file = {field: name for name, field in names.items()}
        raise ConfigError(f"{file}: {explain(error, section, in_file)}") from error


def _check_decoder(decoder: DecoderConfig, stated: Mapping[str, Any]) -> None:
    """Refuse variants of Phi-3 that these models do not have and this code does not implement."""
    only = {
        "num_key_value_heads": decoder.num_heads,
        "hidden_act": "silu",
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "additional_tokens": len(TextConfig().additional),
    }
    for key, value in only.items():
        found = stated.get(key)
        if found not in (None, value):
            raise ConfigError(
                f"config.json: text_config.{key} is {printable(found)}, but only "
                f"{'null' if value is None else value} is supported"
            )


def _check_tiling(config: XGenMMConfig) -> None:
    """Refuse grids that cannot be cut into tiles, or whose tiles do not fit the context."""
    file, tile = "preprocessor_config.json", config.vision.image_size
    if config.tiling.mode == "anyres" and not config.tiling.grids:
        raise ConfigError(f"{file}: grids is empty, but should have a size of at least one grid")
    most_tiles = 1
    for width, height in config.tiling.grids:
        if width % tile or height % tile:
            raise ConfigError(
                f"{file}: grids has [{width}, {height}], but should have multiples of {tile}, "
                "image_size of vision_encoder_config in config.json"
            )
        most_tiles = max(most_tiles, 1 + (width // tile) * (height // tile))
    tokens = most_tiles * config.resampler.num_latents
    if tokens >= config.decoder.max_positions:
        raise ConfigError(
            f"config.json: text_config.max_position_embeddings is {config.decoder.max_positions}, "
            f"but should be more than the {tokens:,} tokens of an image: {most_tiles} tiles of the "
            f"largest of the grids in {file} times {config.resampler.num_latents}, num_latents of "
            "vision_tokenizer_config"
        )


def _check_temporal(config: XGenMMConfig) -> None:
    """Refuse attention heads of a temporal encoder that do not divide the width of its tokens."""
    width, temporal = config.vision.hidden_size, config.temporal
    if temporal is not None and temporal.kind == "gttm" and width % (2 * temporal.num_heads):
        raise ConfigError(
            f"config.json: temporal_encoder_config.num_heads is {temporal.num_heads}, but should "
            f"divide hidden_size of vision_encoder_config ({width}) into multiples of 2"
        )
