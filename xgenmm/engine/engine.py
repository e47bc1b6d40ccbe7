"""Requests in, streamed text out: checks, prompt, text of the tokens, stopping.

Knows nothing of Cog or HTTP. `load` makes an engine of a checkpoint; the work itself is done by
the threads of `scheduler.py`, for many requests at once.
"""

import asyncio
import hashlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from PIL import Image

from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.engine.pool import SchedulerPool
from xgenmm.engine.prefix_cache import LRUCache, PromptHashes
from xgenmm.engine.sampler import StopStringChecker
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.engine.scheduler import EngineRequest, StopReason, Usage
from xgenmm.engine.structured_output import Grammar, GrammarCompiler
from xgenmm.errors import InputError
from xgenmm.kernels.cuda_graphs import MAX_ROWS, compile_kernels
from xgenmm.models.quantization import check_quantization
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import ASSISTANT, END_OF_CHUNK, Message, Prompt, request_prompt
from xgenmm.preprocessing.tiling import TiledImage, tile_image
from xgenmm.preprocessing.tokenizer import SpecialToken, Tokenizer

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_NUM_SEQS = 16
MAX_CACHE_BYTES = 4 << 30
MAX_TILE_BYTES = 256 << 20
MAX_CHOICES = 256


@dataclass(frozen=True)
class Request:
    """One question.

    images: upright RGB, or what `Engine.tiles` made of one. system_prompt: None is the trained
        default.
    choices: the answer is the one of these that is likeliest, given images and question; the
        settings of `sampling` then have no meaning.
    json_schema: the answer is JSON that this JSON Schema admits.
    timeout: seconds after which the answer ends where it is.
    """

    question: str
    images: Sequence[Image.Image | TiledImage] = ()
    system_prompt: str | None = None
    messages: tuple[Message, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choices: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None
    timeout: float | None = None


class Answer:
    """The text of one answer as it is made: iterate over its pieces, `for` or `async for`, once.

    What failed the answer is raised there. `usage` is complete when the iteration has ended.
    `cancel` may come from any thread and ends the iteration before the next token.
    """

    def __init__(
        self,
        tokens: Tokenizer,
        end_ids: frozenset[int],
        stops: Sequence[str],
        choices: Sequence[str],
    ) -> None:
        self.usage = Usage()
        self._decoded = tokens.detokenizer()
        self._stop = StopStringChecker(stops)
        self._end_ids = end_ids
        self._special_ids = frozenset(tokens.specials.values())
        self._choices = choices
        self._items: SimpleQueue[str | Exception | None] = SimpleQueue()
        self._wake: Callable[[], object] = lambda: None
        self._cancelled = threading.Event()
        self._ended = threading.Event()

    def __iter__(self) -> Iterator[str]:
        while (item := _raised(self._items.get())) is not None:
            if not self.cancelled:
                yield item

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits in it any more
                loop.call_soon_threadsafe(ready.set)

        self._wake = wake
        while True:
            try:
                item = _raised(self._items.get_nowait())
            except Empty:
                await ready.wait()
                ready.clear()
                continue
            if item is None:
                return
            if not self.cancelled:
                yield item

    def text(self) -> str:
        """The whole answer, once it is there."""
        self._ended.wait()  # to be woken for every piece would keep the model's thread waiting
        return "".join(self)

    def cancel(self) -> None:
        """Stop after the token in work."""
        self._cancelled.set()

    # What the scheduler needs of a `OutputSink`:

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def token(self, token: int) -> StopReason | None:
        """Pass the token's text on; says why the answer is complete with it, if it is."""
        if token in self._end_ids:
            return "end"
        # A mark that the model makes up in mid-answer is no text.
        if token not in self._special_ids:
            self._put(self._stop.push(self._decoded.push(token)))
        return "stop" if self._stop.stopped else None

    def chosen(self, number: int, probabilities: Sequence[float]) -> None:
        """Pass the choice on as the whole answer."""
        self.usage.choices = dict(zip(self._choices, probabilities, strict=True))
        self._put(self._choices[number])

    def end(self, reason: StopReason, error: Exception | None) -> None:
        """Pass on what was held back, and that this was all."""
        if reason in ("end", "length"):
            self._put(self._stop.push(self._decoded.flush()) + self._stop.flush())
        self._items.put(error)
        self._ended.set()
        self._wake()

    def _put(self, text: str) -> None:
        if text:
            self._items.put(text)
            self._wake()


def _raised(item: str | Exception | None) -> str | None:
    if isinstance(item, Exception):
        raise item
    return item


class Engine:
    """A loaded checkpoint that answers many requests at once."""

    def __init__(
        self,
        model: XGenMM,
        tokens: Tokenizer,
        max_num_seqs: int = MAX_NUM_SEQS,
        cache_bytes: int | None = None,
        prefill_batches_per_step: int = 1,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokens
        self.config = model.config
        self.end_ids = frozenset(tokens.id(token) for token in self.config.text.stop_tokens)
        budget = _default_cache_bytes(model) if cache_bytes is None else cache_bytes
        fitting = _fitting_slots(model, max_num_seqs)
        self._pool = SchedulerPool(model, self.end_ids, fitting, budget, prefill_batches_per_step)
        self._tiles: LRUCache[TiledImage] = LRUCache(min(budget, MAX_TILE_BYTES))
        # Threads know their pool alone, so an engine that nobody holds ends its threads.
        weakref.finalize(self, self._pool.close)

    @property
    def max_num_seqs(self) -> int:
        """How many requests are answered at once."""
        return self._pool.slots

    def preprocess_image(
        self, image: bytes | Image.Image | TiledImage, name: str = "image"
    ) -> TiledImage:
        """An image in tiles, for a request. May be called from any thread.

        image: an encoded file (one that was read lately is not read again), upright RGB, or tiles
            already. name: the input that an error speaks of.

        Raises InputError as `read_image` does.
        """
        if isinstance(image, TiledImage):
            return image
        if isinstance(image, Image.Image):
            return tile_image(image, self.config.tiling, self.config.vision.image_size)
        key = hashlib.sha256(image).digest()
        tiles = self._tiles.get(key)
        if tiles is None:
            tiles = self.preprocess_image(read_image(image, name))
            self._tiles.put(key, tiles)
        return tiles

    def stream(self, request: Request) -> Answer:
        """Check the request, tile its images and queue it; may be called from any thread.

        Raises InputError for a request that cannot be answered: nothing to answer, images and
        `<image>` that do not match, a prompt longer than the context, a schema that cannot be
        enforced. Raises EngineError if the engine is shut down or broken.
        """
        started = time.monotonic()
        self._check(request)
        prompt = self.prompt(request)
        images = [self.preprocess_image(image) for image in request.images]
        choices = [self._choice_ids(choice) for choice in request.choices]
        answer = Answer(
            self.tokenizer, self.end_ids, request.sampling.stop_sequences, request.choices
        )
        room = self._measure(prompt, images, answer.usage)
        if max(map(len, choices), default=0) > room:
            raise InputError("choices", f"the longest has more than the {room} tokens left for it")
        resampler = self.config.resampler
        job = EngineRequest(
            prompt=prompt,
            images=images,
            keys=PromptHashes.of(
                prompt, images, resampler.num_latents, instructed=resampler.text_tokens > 0
            ),
            params=request.sampling,
            limit=min(request.sampling.max_new_tokens, room),
            receiver=answer,
            usage=answer.usage,
            constraint=self._constraint(request),
            choices=choices,
            started=started,
            deadline=started + (float("inf") if request.timeout is None else request.timeout),
        )
        self._pool.submit(job)
        return answer

    def warm_up(self) -> None:
        """Answer a small request, so that nobody pays for what a process does only once."""
        shown = Image.new("RGB", (64, 64))
        self.stream(Request("", [shown], sampling=SamplingParams(max_new_tokens=4))).text()

    def check(self) -> None:
        """Raise EngineError if the engine is dead or stuck; cheap, from any thread."""
        self._pool.check()

    def close(self) -> None:
        """Refuse new requests, let the accepted ones finish, and stop the engine's threads."""
        self._pool.close()
        self._pool.join()

    def prompt(self, request: Request) -> Prompt:
        """The request's prompt; an empty question asks for a description of its images."""
        question = request.question
        if not question.strip():
            if not request.images:
                raise InputError("question", "is empty and there is no image; give one of the two")
            question = self.config.text.caption_question
        return request_prompt(
            self.tokenizer,
            self.config,
            question,
            images=len(request.images),
            system_prompt=request.system_prompt,
            messages=request.messages,
        )

    def _check(self, request: Request) -> None:
        """What can be said without the model."""
        choices, beams = request.choices, request.sampling.num_beams
        if any(not isinstance(choice, str) or not choice for choice in choices):
            raise InputError("choices", "each must be a non-empty text")
        if len(set(choices)) < len(choices):
            raise InputError("choices", "each may be there only once")
        if len(choices) > MAX_CHOICES:
            raise InputError("choices", f"{len(choices)} given; at most {MAX_CHOICES} are allowed")
        if request.json_schema is not None and choices:
            raise InputError("json_schema", "cannot be combined with choices; give one of the two")
        if request.json_schema is not None and beams > 1:
            raise InputError(
                "json_schema", f"cannot be combined with {beams} beams; set num_beams to 1"
            )
        if beams > self.max_num_seqs and not choices:
            raise InputError(
                "num_beams",
                f"{beams} beams take as many slots and this engine has {self.max_num_seqs}; "
                f"set num_beams to at most {self.max_num_seqs}",
            )

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        decoder = self.config.decoder
        return GrammarCompiler(
            self.tokenizer, self.end_ids, decoder.initial_vocab + decoder.additional_tokens
        )

    def _constraint(self, request: Request) -> Grammar | None:
        if request.json_schema is None:
            return None
        return self._grammars.compile(request.json_schema)

    def _choice_ids(self, choice: str) -> list[int]:
        """The ids of a choice as the model would write it, its end included."""
        if self.config.text.prompt == "few_shot":
            before = after = END_OF_CHUNK
        else:
            before, after = ASSISTANT, SpecialToken(self.config.text.stop_tokens[0])
        ids = self.tokenizer.encode_segments([before, choice, after])
        return ids[ids.index(self.tokenizer.id(before)) + 1 :]

    def _measure(self, prompt: Prompt, images: Sequence[TiledImage], usage: Usage) -> int:
        """Note what the prompt takes; returns how many tokens are left for the answer."""
        latents = self.config.resampler.num_latents
        image_tokens = sum(image.pixels.shape[0] * latents for image in images)
        text_tokens = len(prompt.ids) - sum(length for _, length in prompt.spans)
        total, context = text_tokens + image_tokens, self.config.decoder.max_positions
        if total >= context:
            raise InputError(
                "question",
                f"with its images and earlier turns it takes {total} tokens ({image_tokens} for "
                f"{len(images)} images, {text_tokens} for text), {total - context + 1} more "
                f"than the {context - 1} that leave room for an answer; shorten the text or give "
                "fewer images",
            )
        usage.prompt_tokens, usage.image_tokens = total, image_tokens
        return context - total


def load(
    name_or_folder: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
    cache_bytes: int | None = None,
    quantize: str | None = None,
    prefill_batches_per_step: int = 1,
) -> Engine:
    """An engine for a released name, `demo`, or a checkpoint folder.

    Args:
        name_or_folder: see `python -m xgenmm.checkpoints.download list`.
        device: by default the GPU if there is one.
        dtype: of weights and activations; by default bfloat16 on a GPU and float32 on a CPU.
        max_num_seqs: requests answered at once, at most as many as fit half of the free memory;
            further ones wait.
        cache_bytes: memory for what is kept of images and prompts between requests; by default
            an eighth of what is free, at most 4 GB.
        quantize: `int8` or `fp8` for the weights of the decoder's layers; by default neither.
        prefill_batches_per_step: of encoding and prefill that are done between two decode steps:
            one keeps streams even, more get more done.

    Raises:
        CheckpointError: not on this disk, or broken; the message says what to type.
        InputError: a device, dtype or quantization that does not exist here, or no slot.
    """
    if max_num_seqs < 1:
        raise InputError("max_num_seqs", f"must be at least 1, not {max_num_seqs}")
    folder: Path = resolve(name_or_folder)
    where = _device(device)
    kind = _dtype(dtype, where)
    if quantize is not None:
        check_quantization(quantize, where)
    started = time.monotonic()
    config = read_config(folder)
    if config.demo:
        logger.warning("%s is a demonstration, not a released model", folder.name)
    tokens = Tokenizer.from_folder(folder, config.text.convention, config.additional_ids)
    with torch.device("meta"):
        model = XGenMM(config)
    with ThreadPoolExecutor(1) as aside:
        compiled = None
        if where.type == "cuda":
            compiled = aside.submit(
                compile_kernels, config, min(max_num_seqs, MAX_ROWS), kind, quantize
            )
        load_parameters(model, folder, device=where, dtype=kind, quantize=quantize)
        if compiled is not None:
            compiled.result()
    engine = Engine(model, tokens, max_num_seqs, cache_bytes, prefill_batches_per_step)
    seconds = time.monotonic() - started
    logger.info(
        "%s: ready on %s in %s with %d slots after %.1f s",
        folder.name, where, quantize or kind, engine.max_num_seqs, seconds,
    )  # fmt: skip
    return engine


def favour_model_thread() -> None:
    """Make Python's threads take turns after 0.2 ms instead of 5, in the whole process.

    The model's thread gives up the interpreter at each of its many short operations, and is to have
    it back soon. For programs that do little but answer.
    """
    sys.setswitchinterval(0.0002)


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where the model is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _fitting_slots(model: XGenMM, wanted: int) -> int:
    decoder = model.config.decoder
    position = 2 * decoder.num_layers * decoder.hidden_size * model.dtype.itemsize
    slot = position * (decoder.max_positions + 1)
    fit = min(MAX_ROWS, max(1, _free_memory(model.device) // 2 // slot))
    if fit < wanted:
        logger.info(
            "%d slots of %.1f GB fit a step and half of the free memory, not %d: others wait",
            fit, slot / 1e9, wanted,
        )  # fmt: skip
    return min(wanted, fit)


def _default_cache_bytes(model: XGenMM) -> int:
    return min(MAX_CACHE_BYTES, _free_memory(model.device) // 8)


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
