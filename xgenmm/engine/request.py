"""Requests: what a caller asks, what the engine tracks about it, and what the answer cost.

Imports no torch, so that the scheduler can be used and tested without it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xgenmm.engine.prompt_hashes import PromptHashes
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.preprocessing.prompts import Message, Prompt
from xgenmm.preprocessing.tiling import TiledImage
from xgenmm.preprocessing.video import Video

if TYPE_CHECKING:
    import torch

    from xgenmm.engine.beam_search import BeamSearch
    from xgenmm.engine.choices import PartialScore
    from xgenmm.engine.structured_output import Grammar

StopReason = Literal["end", "stop", "length", "cancelled", "timeout", "failed"]


@dataclass(frozen=True)
class Request:
    """One question.

    images: upright RGB, or tiled by `Engine.preprocess_image`. For a video model: the frames of one
        clip, in order.
    system_prompt: None uses the prompt that the model was trained with.
    choices: if given, the answer is the most likely of them and `sampling` is ignored.
    json_schema: if given, the answer is JSON that conforms to this JSON Schema, unless its usage
        says that it stopped for another reason than `end`.
    timeout: seconds after which generation stops and the partial text is returned.
    video: the frames of a clip, in order, from `xgenmm.read_video` or `Engine.preprocess_video`, as
        images, or as uint8 [frames, height, width, 3]. Image models that were trained with several
        images get them as images of one tile, after `images`, and at most as many as fit the
        context beside `max_new_tokens`.
    """

    question: str
    images: Sequence[Image.Image | TiledImage] = ()
    system_prompt: str | None = None
    messages: tuple[Message, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choices: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None
    timeout: float | None = None
    video: (
        Video[Image.Image]
        | Video[TiledImage]
        | Sequence[Image.Image | TiledImage]
        | NDArray[np.uint8]
    ) = ()


@dataclass
class Usage:
    """What an answer cost. Times are in seconds.

    prompt_tokens: length of the prompt, `image_tokens` (vision tokens) included; the keys and
        values of `cached_tokens` of them came from an earlier prompt.
    preemptions: how often the request lost its place to older ones and was computed again.
    queue_time: from the request to its admission.
    prefill_time: from admission to the end of the prompt, image encoding included.
    time_to_first_token: from the request to its first token.
    tokens_per_second: output tokens divided by the time of the whole request.
    batch_size: the largest number of requests in a decode step with this one, itself included.
    decode_path: `kernels` or `plain`, what computed the tokens; see `EngineStatus`.
    stop_reason: `end` (the model ended the answer), `stop` (a stop sequence), `length`
        (max_new_tokens or the context length), `cancelled`, `timeout` or `failed`.
    choices: the probability of each choice, if the request had choices.
    video_frames, video_tokens: frames of the clip and its vision tokens, if the request had one;
        frame_times, if the video came with them: of each frame, after the clip's first.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_time: float = 0.0
    prefill_time: float = 0.0
    time_to_first_token: float = 0.0
    tokens_per_second: float = 0.0
    batch_size: int = 0
    preemptions: int = 0
    decode_path: str = "plain"
    stop_reason: StopReason = "cancelled"
    choices: dict[str, float] | None = None
    video_frames: int | None = None
    video_tokens: int | None = None
    frame_times: list[float] | None = None


class ChoiceScore(NamedTuple):
    """How likely the model is to write a choice.

    log_probability: of all of its tokens after the prompt, its end token included.
    is_greedy: whether each of its tokens is the most likely one.
    """

    log_probability: float
    is_greedy: bool


class OutputSink(Protocol):
    """Receives the output of one request.

    The engine's thread calls all methods except `cancelled`; they must not block.
    """

    @property
    def cancelled(self) -> bool:
        """Whether the caller no longer wants the answer."""

    def token(self, token_id: int) -> StopReason | None:
        """Take the next token. Returns the stop reason if it completes the answer."""

    def chosen(self, index: int, scores: Sequence[ChoiceScore]) -> None:
        """Take the index of the most likely choice, and the score of each choice."""

    def end(self, reason: StopReason, error: Exception | None) -> None:
        """The request has finished; nothing more follows."""


@dataclass(eq=False)
class EngineRequest:
    """A checked request and its progress, which only the engine's thread changes.

    hashes: of `prompt` with `images`.
    max_tokens: limit of output tokens; prompt and output together fit the context.
    choices: token ids of each choice, its end token included; empty for free text.
    started, deadline, admitted: `time.monotonic` seconds.
    rows: of the batch, one for each beam. block_tables: one for each beam; a single one before the
        search begins.
    scratch_blocks: hold the keys and values of choices while they are scored.
    num_prefill_tokens: tokens to compute before the next one can be generated: the prompt and,
        after a preemption, the output so far. num_cached_tokens: the first of them that were found
        in the cache. num_computed_tokens: tokens with keys and values in the cache, or soon to be.
    image_features: of the images or frames that the prompt needs, by index. clip_tokens: the vision
        tokens of the clip, if they were found in the cache.
    embeds: of the tokens to prefill, [tokens, width].
    choice_scores: for each choice, the score of its tokens so far. The choices before `next_choice`
        are scored or being scored.
    """

    prompt: Prompt
    images: Sequence[TiledImage]
    hashes: PromptHashes
    params: SamplingParams
    max_tokens: int
    sink: OutputSink
    usage: Usage = field(default_factory=Usage)
    grammar: "Grammar | None" = None
    choices: Sequence[Sequence[int]] = ()
    started: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")

    num_prompt_tokens: int = field(init=False)  # vision tokens included
    output_token_ids: list[int] = field(default_factory=list, init=False)

    # Set by the scheduler on admission, and again after a preemption.
    admitted: float = field(default=0.0, init=False)
    num_preemptions: int = field(default=0, init=False)
    rows: list[int] = field(default_factory=list, init=False)
    block_hashes: Sequence[bytes] = field(default=(), init=False)
    block_tables: list[list[int]] = field(default_factory=list, init=False)
    scratch_blocks: list[int] = field(default_factory=list, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    num_prefill_tokens: int = field(default=0, init=False)
    num_computed_tokens: int = field(default=0, init=False)

    # What has been computed of the prompt and of answers that are not sampled.
    image_features: "dict[int, torch.Tensor]" = field(default_factory=dict, init=False)
    clip_tokens: "torch.Tensor | None" = field(default=None, init=False)
    embeds: "torch.Tensor | None" = field(default=None, init=False)
    beam_search: "BeamSearch | None" = field(default=None, init=False)
    choice_scores: "list[PartialScore]" = field(default_factory=list, init=False)
    next_choice: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prefill_tokens = len(self.hashes.positions)
        self.block_hashes = self.hashes.blocks

    @property
    def num_seqs(self) -> int:
        """How many batch rows the request needs: one for each beam."""
        return 1 if self.choices else self.params.num_beams

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are sampled one by one: neither beams nor choices."""
        return self.num_seqs == 1 and not self.choices

    @property
    def num_known_tokens(self) -> int:
        """Tokens of the prompt and of the output so far."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def pending_images(self) -> list[int]:
        """Indices of the images that must still be encoded."""
        if self.embeds is not None or self.clip_tokens is not None or self.prefilled:
            return []
        return [
            index
            for index, end in enumerate(self.hashes.image_ends)
            if end > self.num_cached_tokens and index not in self.image_features
        ]

    @property
    def prefilled(self) -> bool:
        """Whether the prompt, and the output before a preemption, have been computed."""
        return self.num_computed_tokens >= self.num_prefill_tokens

    @property
    def decoding(self) -> bool:
        """Whether the request is generating tokens."""
        return self.prefilled and not self.choices

    def preempt(self) -> None:
        """Give up everything that was computed; the output so far stays."""
        self.num_preemptions += 1
        self.num_cached_tokens = self.num_computed_tokens = self.next_choice = 0
        self.num_prefill_tokens = self.num_known_tokens
        self.embeds = self.clip_tokens = self.beam_search = None
        self.image_features, self.choice_scores = {}, []
