"""The model as Cog sees it: form fields in, pieces of text out.

`Predictor` only decouples Cog's interface from inference: it turns the form's inputs into a
`Request`, passes the answer's text on while it is made, and reports what the answer cost. Which
checkpoint runs, on what and in which precision comes from the environment: `XGENMM_MODEL` (a
released name, `demo`, or a folder), `XGENMM_DEVICE` and `XGENMM_DTYPE`.

Cog builds the form from this file without running it and takes texts as they stand here, so every
description and default is one plain literal without escapes, whatever its length.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from queue import Empty, SimpleQueue

from cog import BasePredictor, ConcatenateIterator, Input, Path, streaming
from PIL import Image

import xgenmm
from xgenmm.engine import Answer, Engine, Request
from xgenmm.errors import InputError
from xgenmm.images import read_picture
from xgenmm.prompts import parse_messages
from xgenmm.sampling import SamplingParams

DEFAULT_MODEL = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"

CANCEL_LATENCY = 0.02
"""Seconds between two looks at whether Cog has cancelled the prediction."""

log = logging.getLogger(__name__)


class Predictor(BasePredictor):
    """One checkpoint, loaded once, answering one prediction at a time."""

    engine: Engine

    def setup(self) -> None:
        """Load the checkpoint; a missing one fails here with a message that says what to type."""
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        model = os.environ.get("XGENMM_MODEL") or DEFAULT_MODEL
        log.info("loading %s", model)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        loading = self._worker.submit(
            xgenmm.load,
            model,
            device=os.environ.get("XGENMM_DEVICE") or None,
            dtype=os.environ.get("XGENMM_DTYPE") or None,
        )
        self.engine = loading.result()

    @streaming
    def predict(
        self,
        image: Path | None = Input(
            default=None,
            accept="image/*",
            description="The picture to ask about: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF of at most 64 megapixels. Leave it out to ask about text alone.",
        ),
        images: list[Path] | None = Input(
            default=None,
            description="Further pictures, for a question about several. They come after the first one, in this order.",
        ),
        question: str = Input(
            default="",
            description="What you want to know. Empty: the picture is described. Pictures go before the question, in order; to place them yourself, write <image> once for each.",
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
            description='Earlier turns of the conversation, oldest first: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]. For a base model: worked examples. Pictures of earlier turns come first in order.',
        ),
    ) -> ConcatenateIterator[str]:
        """Answer a question about pictures, the text streaming while it is made."""
        request = Request(
            pictures=_pictures(image, images or ()),
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
        )
        return self._texts(self.engine.stream(request))

    def _texts(self, answer: Answer) -> Iterator[str]:
        """Yield the answer's pieces, then report what it cost.

        Cog cancels by raising an exception between any two instructions of the thread that runs
        this generator. So the model has a thread of its own, which is asked to stop and does when
        the token it is working on is done.
        """
        texts: SimpleQueue[str | None] = SimpleQueue()
        try:
            made = self._worker.submit(_make, answer, texts)
            yield from _taken(texts)
            made.result()
        finally:
            answer.cancel()
            # The worker does one thing at a time, so it gets to this when the answer is over.
            usage = self._worker.submit(lambda: answer.usage).result()
            for name, value in asdict(usage).items():
                self.record_metric(name, value)


def _make(answer: Answer, texts: SimpleQueue[str | None]) -> None:
    """Put an answer's pieces into `texts`, and None when there will be no more."""
    try:
        for text in answer:
            texts.put(text)
    finally:
        texts.put(None)


def _taken(texts: SimpleQueue[str | None]) -> Iterator[str]:
    """Yield pieces until None; never waits long, because a waiting thread cannot be cancelled."""
    while True:
        try:
            text = texts.get(timeout=CANCEL_LATENCY)
        except Empty:
            continue
        if text is None:
            return
        yield text


def _pictures(image: Path | None, images: Sequence[Path]) -> list[Image.Image]:
    """Read the pictures that Cog has fetched.

    A `str` is what Cog did not take for an address. It must not be opened: it would be a path on
    this machine, chosen by a stranger.
    """
    sources = [] if image is None else [("image", image)]
    sources += [(f"images[{i}]", path) for i, path in enumerate(images)]
    for name, source in sources:
        if isinstance(source, str):
            raise InputError(name, "must be an http:// or https:// address or a data URL")
    return [read_picture(source, name) for name, source in sources]
