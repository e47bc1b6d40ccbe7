"""Sizes and behavior of a checkpoint, as frozen dataclasses.

What differs between the released families (vision tower, tiling, mask, tokenizer, prompt) is data
here, so that no other module depends on a model's name. Reads no files.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Size = tuple[int, int]  # (width, height), as in PIL

BLOCK_SIZE = 32
"""Positions of one block of the KV cache."""

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, also used by DFN
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ConfigError(ValueError):
    """A checkpoint's configuration is incomplete or contradicts itself."""


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower.

    `output_dim` is the width of open_clip's projection to the text space: its weights are in the
    checkpoint but not used.
    """

    tower: Literal["siglip", "open_clip"] = "siglip"
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    output_dim: int = 0

    @property
    def grid(self) -> int:
        """Features along one side of a tile: 27 for the released towers."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of the Perceiver resampler.

    `text_tokens` is the number of prompt tokens that an instruction-aware resampler (v1 instruct)
    takes as additional queries; 0 for the plain resampler.
    """

    num_latents: int = 128
    depth: int = 6
    num_heads: int = 16
    head_dim: int = 96
    text_tokens: int = 0
    masked: bool = True  # exclude padding from attention; v1 was trained without this mask


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the Phi-3 decoder, and of the additional tokens with their own embedding rows."""

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_layers: int = 32
    num_heads: int = 32
    max_positions: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int = 2047
    initial_vocab: int = 32012  # id of the first additional token
    additional_tokens: int = 3

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


GRIDS_384: tuple[Size, ...] = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
GRIDS_378: tuple[Size, ...] = ((378, 756), (756, 378), (756, 756), (1134, 378), (378, 1134))


@dataclass(frozen=True)
class TilingConfig:
    """How an image is cut into tiles.

    Attributes:
        mode: `anyres` adds the tiles of the best-fitting grid to the resized whole image; `squash`
            resizes the image to one tile, `pad` does so after padding it to a square.
        grids: sizes of the canvases that `anyres` may cut into tiles, in pixels.
        mean, std: for normalization, a value for each channel.
    """

    mode: Literal["anyres", "squash", "pad"] = "anyres"
    grids: tuple[Size, ...] = GRIDS_384
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


def from_json(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], release: str | None = None
) -> XGenMMConfig:
    """Return the configuration for a checkpoint's `config.json` and `preprocessor_config.json`.

    Released files state few sizes (defaults of their remote code supply the rest), so the release's
    entry in RELEASES is the base. Without `release`, the base follows from the architecture and
    from whether the preprocessor has grids. Sizes that the files do state take precedence; the demo
    checkpoint, which has the same layout but is smaller, states those that differ.

    Raises:
        ConfigError: the architecture is unknown.
    """
    base = RELEASES[release] if release in RELEASES else _family(config, preprocessor)
    vision = config.get("vision_encoder_config", {})
    resampler = config.get("vision_tokenizer_config", {})
    text = config.get("text_config", {})
    tiling = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
    if base.tiling.mode == "anyres":
        tiling["grids"] = preprocessor.get("grids")
    return dataclasses.replace(
        base,
        vision=_override(base.vision, vision, _VISION_KEYS),
        resampler=_override(base.resampler, resampler, {}),
        decoder=_override(base.decoder, text, _TEXT_KEYS),
        tiling=_override(base.tiling, tiling, {}),
        demo=bool(config.get("demo", False)),
    )


# Hugging Face's names of the fields that are named differently here.
_VISION_KEYS = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
_TEXT_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
    "initial_tokenizer_len": "initial_vocab",
}


def _family(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> XGenMMConfig:
    architecture = " ".join(config.get("architectures") or [str(config.get("model_type"))]).lower()
    anyres = preprocessor.get("grids") is not None
    if "xgenmm" in architecture:
        name = INTERLEAVE if anyres else "xgen-mm-phi3-mini-base-r-v1.5"
    elif "blip" in architecture:
        name = f"xgen-mm-phi3-mini-{'instruct' if anyres else 'base'}-r-v1"
    else:
        raise ConfigError(
            f"config.json: architecture {architecture!r} is not an xGen-MM model; "
            "expected XGenMMModelForConditionalGeneration or Blip3ModelForConditionalGeneration"
        )
    return RELEASES[name]


ConfigT = TypeVar("ConfigT", VisionConfig, ResamplerConfig, DecoderConfig, TilingConfig)


def _override(base: ConfigT, stated: Mapping[str, Any], names: Mapping[str, str]) -> ConfigT:
    """Return `base` with the values in `stated`; keys that are not fields are ignored."""
    fields = {f.name for f in dataclasses.fields(base)}
    changes = {names.get(key, key): value for key, value in stated.items() if value is not None}
    return dataclasses.replace(
        base, **{name: _frozen(value) for name, value in changes.items() if name in fields}
    )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
