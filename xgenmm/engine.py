"""Requests in, streamed text out: prompt, prefill, decode steps, stopping.

Knows nothing of Cog or HTTP. `load` makes an engine of a checkpoint.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from xgenmm.checkpoint import load_parameters, read_config, resolve
from xgenmm.errors import InputError
from xgenmm.generate import generate
from xgenmm.model import XGenMM
from xgenmm.prompts import Message, Prompt, chat_prompt, few_shot_prompt
from xgenmm.sampling import SamplingParams, StopText
from xgenmm.tiles import Tiles, tile_picture
from xgenmm.tokens import Tokens

logger = logging.getLogger(__name__)

StopReason = Literal["end", "stop", "length", "cancelled"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """One question. `pictures` are upright RGB; `system_prompt` None is the trained default."""

    question: str
    pictures: Sequence[Image.Image] = ()
    system_prompt: str | None = None
    messages: tuple[Message, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass
class Usage:
    """What an answer cost. Times count from `Engine.stream`.

    prompt_tokens: positions of the prompt, `image_tokens` of them vision tokens.
    time_to_first_token: seconds. tokens_per_second: output tokens over the whole time.
    stop_reason: `end` (the model's own end), `stop` (a stop sequence), `length` (max_new_tokens
        or the context), `cancelled`.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    time_to_first_token: float = 0.0
    tokens_per_second: float = 0.0
    stop_reason: StopReason = "cancelled"


class Answer:
    """The text of one answer as it is made: iterate over its pieces, once.

    `usage` is complete when the iteration has ended. `cancel` may come from any thread and ends
    the iteration before the next token.
    """

    def __init__(self, texts: Iterator[str], usage: Usage, cancelled: threading.Event) -> None:
        self.usage = usage
        self._texts = texts
        self._cancelled = cancelled

    def __iter__(self) -> Iterator[str]:
        return self._texts

    def cancel(self) -> None:
        """Stop after the token in work."""
        self._cancelled.set()


class Engine:
    """A loaded checkpoint that answers requests. It keeps no state of them."""

    def __init__(self, model: XGenMM, tokens: Tokens) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokens = tokens
        self.config = model.config
        self.end_ids = frozenset(tokens.id(token) for token in self.config.text.stop_tokens)
        self._special_ids = frozenset(tokens.specials.values())

    def stream(self, request: Request) -> Answer:
        """Check the request and begin its answer; the work is done while one iterates.

        Raises InputError for a request that cannot be answered: nothing to answer, pictures and
        `<image>` that do not match, a prompt longer than the context.
        """
        started = time.monotonic()
        prompt = self.prompt(request)
        tile = self.config.vision.image_size
        pictures = [tile_picture(p, self.config.tiling, tile) for p in request.pictures]
        room, usage = self._measure(prompt, pictures)
        cancelled = threading.Event()
        limit = min(request.sampling.max_new_tokens, room)
        texts = self._texts(prompt, pictures, request.sampling, limit, usage, cancelled, started)
        return Answer(texts, usage, cancelled)

    def prompt(self, request: Request) -> Prompt:
        """The request's prompt; an empty question asks for a description of its pictures."""
        question = request.question
        if not question.strip():
            if not request.pictures:
                raise InputError("question", "is empty and there is no image; give one of the two")
            question = self.config.text.caption_question
        count = len(request.pictures)
        if self.config.text.prompt == "few_shot":
            latents = self.config.sampler.num_latents
            return few_shot_prompt(
                self.tokens,
                question,
                pictures=count,
                num_latents=latents,
                messages=request.messages,
            )
        return chat_prompt(
            self.tokens,
            question,
            pictures=count,
            system_prompt=request.system_prompt,
            messages=request.messages,
        )

    def _measure(self, prompt: Prompt, pictures: Sequence[Tiles]) -> tuple[int, Usage]:
        """How many tokens the context has left for the answer, and what the prompt takes."""
        latents = self.config.sampler.num_latents
        image_tokens = sum(picture.pixels.shape[0] * latents for picture in pictures)
        text_tokens = len(prompt.ids) - sum(length for _, length in prompt.spans)
        total, context = text_tokens + image_tokens, self.config.decoder.max_positions
        if total >= context:
            raise InputError(
                "question",
                f"with its pictures and earlier turns it takes {total} tokens ({image_tokens} for "
                f"{len(pictures)} pictures, {text_tokens} for text), {total - context + 1} more "
                f"than the {context - 1} that leave room for an answer; shorten the text or give "
                "fewer pictures",
            )
        return context - total, Usage(prompt_tokens=total, image_tokens=image_tokens)

    def _texts(
        self,
        prompt: Prompt,
        pictures: Sequence[Tiles],
        params: SamplingParams,
        limit: int,
        usage: Usage,
        cancelled: threading.Event,
        started: float,
    ) -> Iterator[str]:
        decoded, stop, ended = self.tokens.stream(), StopText(params.stop_sequences), False
        vision_tokens = self.model.encode(pictures, prompt)
        embeds = self.model.fuse(prompt, vision_tokens)
        for token in generate(self.model, embeds, params, limit, self.end_ids, cancelled.is_set):
            if not usage.output_tokens:
                usage.time_to_first_token = time.monotonic() - started
            usage.output_tokens += 1
            usage.tokens_per_second = usage.output_tokens / (time.monotonic() - started)
            ended = token in self.end_ids
            # A mark that the model makes up in mid-answer is no text.
            if token not in self._special_ids and (text := stop.push(decoded.push(token))):
                yield text
            if ended or stop.stopped:
                break
        if cancelled.is_set():
            return
        rest = stop.push(decoded.flush()) + stop.flush()
        usage.stop_reason = "stop" if stop.stopped else "end" if ended else "length"
        if rest:
            yield rest


def load(
    name_or_folder: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Engine:
    """An engine for a released name, `demo`, or a checkpoint folder.

    Args:
        name_or_folder: see `python -m xgenmm.weights list`.
        device: by default the GPU if there is one.
        dtype: of weights and activations; by default bfloat16 on a GPU and float32 on a CPU.

    Raises:
        CheckpointError: not on this disk, or broken; the message says what to type.
        InputError: a device or dtype that does not exist here.
    """
    folder: Path = resolve(name_or_folder)
    where = _device(device)
    kind = _dtype(dtype, where)
    started = time.monotonic()
    config = read_config(folder)
    tokens = Tokens.from_folder(folder, config.text.convention, config.additional_ids)
    with torch.device("meta"):
        model = XGenMM(config)
    load_parameters(model, folder, device=where, dtype=kind)
    seconds = time.monotonic() - started
    logger.info("%s: ready on %s in %s after %.1f s", folder.name, where, kind, seconds)
    if config.demo:
        logger.warning("%s is a demonstration, not a released model", folder.name)
    return Engine(model, tokens)


def _device(wanted: str | torch.device | None) -> torch.device:
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError("device", f"{wanted!r} is not one; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device", f"{wanted} was asked for, but PyTorch sees no GPU; use cpu")
    return device


def _dtype(wanted: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if wanted is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in DTYPES:
        raise InputError("dtype", f"{wanted!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[wanted]
