"""Sizes and behavior of a checkpoint, as frozen dataclasses that pydantic validates.

What differs between the released families (vision tower, tiling, mask, tokenizer, prompt) is data
here, so that no other module depends on a model's name. Reads no files.
"""

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

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
class TemporalConfig:
    """Sizes of the temporal encoder, which turns the latents of a clip's frames into its tokens.

    Attributes:
        kind: `gttm` (Grouped Token Turing Machine: one token for each latent), or `token_learner`
            (`num_tokens` tokens, whatever the order of the frames).
        memory_size, num_layers, num_heads: of the Token Turing Machine; tokens of memory for each
            latent, layers and attention heads.
        num_tokens: of a clip, by the token learner.
    """

    kind: Literal["gttm", "token_learner"] = "gttm"
    memory_size: Count = 4
    num_layers: Count = 4
    num_heads: Count = 8
    num_tokens: Width = 32


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


TilingMode = Literal["anyres", "squash", "pad"]

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

    mode: TilingMode = "anyres"
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
    temporal: TemporalConfig | None = None  # of a video model: its images are frames of one clip
    frames_as_images: bool = False  # whether an image model may get the frames of a clip as images
    demo: bool = False  # a demonstration model; programs tell the user

    @property
    def additional_ids(self) -> dict[str, int]:
        """Ids of the additional tokens, in the order of their embedding rows."""
        first = self.decoder.initial_vocab
        return {token: first + row for row, token in enumerate(self.text.additional)}

    @property
    def frame_tiling(self) -> TilingConfig:
        """How a frame of a clip is tiled. Image models get one tile, so that more frames fit."""
        if self.temporal is not None:
            return self.tiling
        return dataclasses.replace(self.tiling, mode="squash")

    @property
    def clip_tokens(self) -> int:
        """Vision tokens of a clip of any number of frames; 0 if this is not a video model."""
        if self.temporal is None:
            return 0
        learner = self.temporal.kind == "token_learner"
        return self.temporal.num_tokens if learner else self.resampler.num_latents


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
_VIDEO = XGenMMConfig(
    tiling=TilingConfig("pad", ()),
    text=TextConfig(caption_question="Describe this video."),
    temporal=TemporalConfig(),
)

INTERLEAVE = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"
VIDEO_128 = "xgen-mm-vid-phi3-mini-r-v1.5-128tokens-8frames"
VIDEO_32 = "xgen-mm-vid-phi3-mini-r-v1.5-32tokens-8frames"
RELEASES: dict[str, XGenMMConfig] = {
    INTERLEAVE: XGenMMConfig(frames_as_images=True),
    "xgen-mm-phi3-mini-instruct-singleimg-r-v1.5": XGenMMConfig(),
    "xgen-mm-phi3-mini-instruct-dpo-r-v1.5": XGenMMConfig(frames_as_images=True),
    "xgen-mm-phi3-mini-base-r-v1.5": XGenMMConfig(tiling=_SQUASH, text=_FEW_SHOT),
    "xgen-mm-phi3-mini-instruct-r-v1": XGenMMConfig(_VIT_H, _INSTRUCTION_AWARE, tiling=_ANYRES_V1),
    "xgen-mm-phi3-mini-base-r-v1": XGenMMConfig(_VIT_H, tiling=_SQUASH_V1, text=_FEW_SHOT),
    VIDEO_128: _VIDEO,
    VIDEO_32: dataclasses.replace(_VIDEO, temporal=TemporalConfig("token_learner")),
}
