"""The model as Cog sees it: form fields in, pieces of text out, for many predictions at once.

`Predictor` only decouples Cog's interface from inference: it turns the form's inputs into a
`Request`, passes the answer's text on while it is made, and reports what the answer cost. The
environment says the rest: `XGENMM_MODEL` (a released name, `demo`, or a folder), `XGENMM_DEVICE`,
`XGENMM_DTYPE`, `XGENMM_QUANTIZE` (`int8` or `fp8`), `XGENMM_TIMEOUT` (seconds after which an answer
ends where it is), and Cog's own `COG_MAX_CONCURRENCY`, which `cog build` takes from the decorator
of `predict`.

Cog builds the form from this file without running it and takes texts as they stand here, so every
description and default is one plain literal without escapes, whatever its length.
"""

import asyncio
import atexit
import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any, TypeVar

from cog import (
    BasePredictor,
    CancelationException,
    ConcatenateIterator,
    Input,
    Path,
    concurrent,
    streaming,
)

import xgenmm
from xgenmm import Engine, InputError, Request, SamplingParams
from xgenmm.engine.engine import favour_model_thread
from xgenmm.engine.sampling_params import MOST_BEAMS
from xgenmm.preprocessing.prompts import parse_messages

DEFAULT_MODEL = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"

Number = TypeVar("Number", int, float)

logger = logging.getLogger(__name__)


class Predictor(BasePredictor):
    """One checkpoint, loaded once, answering as many predictions at a time as Cog lets in."""

    engine: Engine
    timeout: float | None

    def setup(self) -> None:
        """Load the checkpoint; a missing one fails here with a message that says what to type."""
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        model = os.environ.get("XGENMM_MODEL") or DEFAULT_MODEL
        self.timeout = _setting("XGENMM_TIMEOUT", float)
        favour_model_thread()
        # What is imported stays. To look through it for garbage would stop all streams for 0.2 s.
        gc.freeze()
        logger.info("loading %s", model)
        self.engine = xgenmm.load(
            model,
            device=os.environ.get("XGENMM_DEVICE") or None,
            dtype=os.environ.get("XGENMM_DTYPE") or None,
            quantize=os.environ.get("XGENMM_QUANTIZE") or None,
            max_num_seqs=max(_setting("COG_MAX_CONCURRENCY", int) or 1, MOST_BEAMS),
        )
        self.engine.warm_up()
        # Cog has no hook for the end; its worker comes here when the last prediction is over.
        atexit.register(self.engine.close)

    def healthcheck(self) -> bool:
        """Tell Cog whether the engine still works; one that does not fails with the reason."""
        self.engine.check()
        return True

    @concurrent(max=16)
    @streaming
    async def predict(
        self,
        image: Path | None = Input(
            default=None,
            accept="image/*",
            description="The image to ask about: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF of at most 64 megapixels. Leave it out to ask about text alone.",
        ),
        images: list[Path] | None = Input(
            default=None,
            description="Further images, for a question about several. They come after the first one, in this order.",
        ),
        question: str = Input(
            default="",
            description="What you want to know. Empty: the image is described. Images go before the question, in order; to place them yourself, write <image> once for each.",
        ),
        system_prompt: str = Input(
            default="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.",
            description="How the assistant should behave. The models were trained with the text given here. Base models take none and ignore it.",
        ),
        max_new_tokens: int = Input(
            default=768,
            ge=1,
            le=2048,
            description="The longest answer allowed, in tokens (a token is about three quarters of an English word).",
        ),
        temperature: float = Input(
            default=0.0,
            ge=0.0,
            le=2.0,
            description="0 always takes the most likely next token, so the same question gets the same answer. Higher values vary the answer more.",
        ),
        top_p: float = Input(
            default=1.0,
            ge=0.0,
            le=1.0,
            description="With a temperature above 0: choose among the most likely tokens that together reach this probability. 1 considers all.",
        ),
        top_k: int = Input(
            default=0,
            ge=0,
            le=100000,
            description="With a temperature above 0: choose among this many most likely tokens. 0 considers all.",
        ),
        num_beams: int = Input(
            default=1,
            ge=1,
            le=8,
            description="Follow this many answers at once and return the most likely. 1 is fastest; more needs temperature 0, and the text then comes in one piece at the end.",
        ),
        repetition_penalty: float = Input(
            default=1.0,
            ge=0.5,
            le=3.0,
            description="Above 1 discourages words that were already used. 1 is off.",
        ),
        stop_sequences: list[str] | None = Input(
            default=None,
            description="The answer ends before the first of these texts. At most 16.",
        ),
        seed: int | None = Input(
            default=None,
            ge=0,
            description="With a temperature above 0: the same seed repeats the same answer. Empty: a new one each time.",
        ),
        messages: list[dict[str, str]] | None = Input(
            default=None,
            description='Earlier turns of the conversation, oldest first: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]. For a base model: worked examples. Images of earlier turns come first in order.',
        ),
        choices: list[str] | None = Input(
            default=None,
            description="The answer is one of these texts: the most likely one. The metric choices then gives the probability of each.",
        ),
        json_schema: dict[str, Any] | None = Input(
            default=None,
            description='The answer is JSON that follows this JSON Schema, for example {"type": "object", "properties": {"color": {"type": "string"}}, "required": ["color"]}.',
        ),
    ) -> ConcatenateIterator[str]:
        """Answer a question about images, the text streaming while it is made.

        What runs here would hold up all predictions, so the work is left to the generator: Cog
        goes through it in a thread that belongs to the prediction.
        """
        if choices is not None and not choices:
            raise InputError("choices", "is empty; give the texts to choose from or leave it out")
        request = Request(
            question=question,
            system_prompt=system_prompt,
            messages=parse_messages(messages or ()),
            sampling=SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                num_beams=num_beams,
                repetition_penalty=repetition_penalty,
                stop_sequences=tuple(stop_sequences or ()),
                seed=seed,
            ),
            choices=tuple(choices or ()),
            json_schema=json_schema,
            timeout=self.timeout,
        )
        # Only here is the scope this prediction's own; the generator's thread knows none.
        record_metric = self.scope.record_metric
        return self._texts(request, image, images or (), _prediction(), record_metric)

    def _texts(
        self,
        request: Request,
        image: Path | None,
        images: Sequence[Path],
        prediction: Future[None],
        record_metric: Callable[[str, Any], None],
    ) -> Iterator[str]:
        """Yield the answer's pieces until it ends or `prediction` is cancelled; record its cost."""
        images = [
            self.engine.preprocess_image(source.read_bytes(), name)
            for name, source in _sources(image, images)
        ]
        answer = self.engine.stream(replace(request, images=images))
        prediction.add_done_callback(lambda _: answer.cancel())
        try:
            yield from answer
            if prediction.cancelled():
                raise CancelationException
        finally:
            answer.cancel()
            for name, value in asdict(answer.usage).items():
                if value is not None:
                    record_metric(name, value)


def _prediction() -> Future[None]:
    """A future that Cog cancels when it cancels the prediction whose coroutine calls this.

    Cog cancels a prediction by the future of its coroutine. Ours returns a generator at once, so
    that future is done while the text is still made, and to cancel it has no effect. Its `cancel`
    is therefore replaced. A task has no public way to the future that waits for it; the callback
    that will hand over the result knows it.
    """
    prediction: Future[None] = Future()
    task: Any = asyncio.current_task()
    for callback, _ in task._callbacks:
        for cell in getattr(callback, "__closure__", None) or ():
            if isinstance(cell.cell_contents, Future):
                vars(cell.cell_contents)["cancel"] = prediction.cancel
    return prediction


def _setting(name: str, kind: Callable[[str], Number]) -> Number | None:
    """The number above 0 that an environment variable gives; None without it."""
    text = os.environ.get(name)
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if (number := kind(text)) > 0:
            return number
    raise InputError(name, f"must be a number above 0, not {text!r}")


def _sources(image: Path | None, images: Sequence[Path]) -> list[tuple[str, Path]]:
    """The images that Cog has fetched, in their order, each with the name of its input.

    A `str` is what Cog did not take for an address. It must not be opened: it would be a path on
    this machine, chosen by a stranger.
    """
    sources = [] if image is None else [("image", image)]
    sources += [(f"images[{i}]", path) for i, path in enumerate(images)]
    for name, source in sources:
        if isinstance(source, str):
            raise InputError(name, "must be an http:// or https:// address or a data URL")
    return sources
