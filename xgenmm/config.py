"""Sizes and behavior of a checkpoint, as frozen dataclasses that pydantic validates.

What differs between the released families (vision tower, tiling, mask, tokenizer, prompt) is data
here, so that no other module depends on a model's name. Reads no files.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass

from xgenmm.errors import explain, printable

# The upper limits are far above every model of this family. They only keep a malicious file from
# costing much memory before its sizes are compared with those of the tensors.
Width = Annotated[int, Field(ge=1, le=2**20)]
Count = Annotated[int, Field(ge=1, le=1024)]
Pixels = Annotated[int, Field(ge=1, le=2**16)]
Positions = Annotated[int, Field(ge=1, le=2**31 - 1)]
Size = tuple[Pixels, Pixels]  # (width, height), as in PIL
Mean = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(ge=1e-3, le=1)]  # pixels are between 0 and 1

BLOCK_SIZE = 32
"""Positions of one block of the KV cache."""

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, also used by DFN
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_STRICT = ConfigDict(strict=True, extra="forbid", validate_default=True)


class ConfigError(ValueError):
    """A checkpoint's configuration is incomplete or contradicts itself."""


@dataclass(frozen=True, config=_STRICT)
class VisionConfig:
    """Sizes of a vision tower.

    `output_dim` is the width of open_clip's projection to the text space: its weights are in the
    checkpoint but not used.
    """

    tower: Literal["siglip", "open_clip"] = "siglip"
    hidden_size: Width = 1152
    intermediate_size: Width = 4304
    num_layers: Count = 27
    num_heads: Count = 16
    image_size: Pixels = 384
    patch_size: Pixels = 14
    output_dim: Annotated[int, Field(ge=0, le=2**20)] = 0

    @property
    def grid(self) -> int:
        """Features along one side of a tile: 27 for the released towers."""
        return self.image_size // self.patch_size

    @field_validator("num_heads")
    @classmethod
    def _check_heads(cls, heads: int, info: ValidationInfo) -> int:
        return _check_divisor(heads, info, "hidden_size")

    @field_validator("patch_size")
    @classmethod
    def _check_patch(cls, size: int, info: ValidationInfo) -> int:
        return _check_at_most(size, info, "image_size")


@dataclass(frozen=True, config=_STRICT)
class ResamplerConfig:
    """Sizes of the Perceiver resampler.

    `text_tokens` is the number of prompt tokens that an instruction-aware resampler (v1 instruct)
    takes as additional queries; 0 for the plain resampler.
    """

    num_latents: Width = 128
    depth: Count = 6
    num_heads: Count = 16
    head_dim: Width = 96
    text_tokens: Annotated[int, Field(ge=0, le=2**20)] = 0
    masked: bool = True  # exclude padding from attention; v1 was trained without this mask


@dataclass(frozen=True, config=_STRICT)
class DecoderConfig:
    """Sizes of the Phi-3 decoder, and of the additional tokens with their own embedding rows."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)] = 32064
    hidden_size: Width = 3072
    intermediate_size: Width = 8192
    num_layers: Count = 32
    num_heads: Count = 32
    max_positions: Annotated[int, Field(ge=1, le=2**20)] = 4096
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    rope_theta: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10000.0
    sliding_window: Annotated[int, Field(ge=1, le=2**31 - 2)] = 2047
    initial_vocab: Positions = 32012  # id of the first additional token
    additional_tokens: Count = 3

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def window_keys(self) -> int:
        """Keys that a position attends to: itself and `sliding_window` before it.

        The released weights were trained this way. transformers attends to one key fewer for the
        same `sliding_window`.
        """
        return self.sliding_window + 1

    @field_validator("num_heads")
    @classmethod
    def _check_heads(cls, heads: int, info: ValidationInfo) -> int:
        # Rotary position embedding rotates pairs, so the width of a head is even.
        return _check_divisor(heads, info, "hidden_size", factor=2)

    @field_validator("initial_vocab")
    @classmethod
    def _check_vocabulary(cls, size: int, info: ValidationInfo) -> int:
        return _check_at_most(size, info, "vocab_size")


def _check_divisor(count: int, info: ValidationInfo, of: str, factor: int = 1) -> int:
    """Refuse a count that does not divide an earlier field into multiples of `factor`."""
    total = info.data.get(of)
    if total is not None and total % (factor * count):
        rest = f"{of} ({total})" if factor == 1 else f"{of} ({total}) into multiples of {factor}"
        raise ValueError(f"should divide {rest}")
    return count


def _check_at_most(value: int, info: ValidationInfo, other: str) -> int:
    """Refuse a value that is more than an earlier field."""
    limit = info.data.get(other)
    if limit is not None and value > limit:
        raise ValueError(f"should be at most {other} ({limit})")
    return value


GRIDS_384: tuple[Size, ...] = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
GRIDS_378: tuple[Size, ...] = ((378, 756), (756, 378), (756, 756), (1134, 378), (378, 1134))


@dataclass(frozen=True, config=_STRICT)
class TilingConfig:
    """How an image is cut into tiles.

    Attributes:
        mode: `anyres` adds the tiles of the best-fitting grid to the resized whole image; `squash`
            resizes the image to one tile, `pad` does so after padding it to a square.
        grids: sizes of the canvases that `anyres` may cut into tiles, in pixels.
        mean, std: for normalization, a value for each channel.
    """

    mode: Literal["anyres", "squash", "pad"] = "anyres"
    grids: Annotated[
        tuple[Annotated[Size, Field(strict=False)], ...], Field(strict=False, max_length=64)
    ] = GRIDS_384
    mean: Annotated[tuple[Mean, Mean, Mean], Field(strict=False)] = HALF
    std: Annotated[tuple[Deviation, Deviation, Deviation], Field(strict=False)] = HALF


@dataclass(frozen=True, config=_STRICT)
class TextConfig:
    """Tokenizer convention, prompt style, and the tokens that end an answer.

    `convention` selects which of the two tokenizers of a checkpoint to reproduce: they treat spaces
    around special tokens differently, and the model was trained with one of them.
    """

    convention: Literal["slow", "fast"] = "slow"
    prompt: Literal["chat", "few_shot"] = "chat"
    stop_tokens: tuple[str, ...] = ("<|end|>", "<|endoftext|>")
    caption_question: str = "Describe the image."  # used for an empty question
    additional: tuple[str, ...] = ("<image>", "<image placeholder>", "<|endofchunk|>")


@dataclass(frozen=True, config=_STRICT)
class XGenMMConfig:
    """Everything about a checkpoint that its weights do not determine."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    tiling: TilingConfig = field(default_factory=TilingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    demo: bool = False  # a demonstration model; programs tell the user

    @property
    def additional_ids(self) -> dict[str, int]:
        """Ids of the additional tokens, in the order of their embedding rows."""
        first = self.decoder.initial_vocab
        return {token: first + row for row, token in enumerate(self.text.additional)}


_VIT_H = VisionConfig("open_clip", 1280, 5120, 32, 16, 378, 14, output_dim=1024)
_ANYRES_V1 = TilingConfig("anyres", GRIDS_378, CLIP_MEAN, CLIP_STD)
_SQUASH_V1 = TilingConfig("squash", (), CLIP_MEAN, CLIP_STD)
_SQUASH = TilingConfig("squash", ())
_INSTRUCTION_AWARE = ResamplerConfig(text_tokens=256, masked=False)
_FEW_SHOT = TextConfig(
    "fast",
    "few_shot",
    stop_tokens=("<|endofchunk|>", "<|endoftext|>"),
    caption_question="A short description of this image in one sentence:",  # the authors' notebook
)

INTERLEAVE = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"
RELEASES: dict[str, XGenMMConfig] = {
    INTERLEAVE: XGenMMConfig(),
    "xgen-mm-phi3-mini-instruct-singleimg-r-v1.5": XGenMMConfig(),
    "xgen-mm-phi3-mini-instruct-dpo-r-v1.5": XGenMMConfig(),
    "xgen-mm-phi3-mini-base-r-v1.5": XGenMMConfig(tiling=_SQUASH, text=_FEW_SHOT),
    "xgen-mm-phi3-mini-instruct-r-v1": XGenMMConfig(_VIT_H, _INSTRUCTION_AWARE, tiling=_ANYRES_V1),
    "xgen-mm-phi3-mini-base-r-v1": XGenMMConfig(_VIT_H, tiling=_SQUASH_V1, text=_FEW_SHOT),
}


class _ConfigFile(BaseModel, strict=True):
    """What is read of `config.json`. The sections' fields are those of the dataclasses above."""

    architectures: list[str] | None = None
    model_type: str | None = None
    demo: bool | None = None
    vision_encoder_config: dict[str, Any] | None = None
    vision_tokenizer_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


def from_json(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], release: str | None = None
) -> XGenMMConfig:
    """Return the configuration for a checkpoint's `config.json` and `preprocessor_config.json`.

    Released files state few sizes (defaults of their remote code supply the rest), so the release's
    entry in RELEASES is the base. Without `release`, the base follows from the architecture and
    from whether the preprocessor has grids. Sizes that the files do state take precedence; the demo
    checkpoint, which has the same layout but is smaller, states those that differ.

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
        tiling=_override(base.tiling, "", tiling),
        demo=bool(file.demo),
    )
    _check_decoder(parsed.decoder, file.text_config or {})
    _check_tiling(parsed)
    return parsed


# The files' names of the fields that are named differently here.
_NAMES = {
    "vision_encoder_config": {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    },
    "vision_tokenizer_config": {},
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
    if "xgenmm" in architecture:
        name = INTERLEAVE if anyres else "xgen-mm-phi3-mini-base-r-v1.5"
    elif "blip" in architecture:
        name = f"xgen-mm-phi3-mini-{'instruct' if anyres else 'base'}-r-v1"
    else:
        raise ConfigError(
            f"config.json: architectures: {printable(architecture)!r} is not an xGen-MM model; "
            "expected XGenMMModelForConditionalGeneration or Blip3ModelForConditionalGeneration"
        )
    return RELEASES[name]


ConfigT = TypeVar("ConfigT", VisionConfig, ResamplerConfig, DecoderConfig, TilingConfig)


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
