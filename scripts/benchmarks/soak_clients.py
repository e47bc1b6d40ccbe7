"""The clients of the part `soak`: random requests, read to the end, cancelled or abandoned."""

import asyncio
import contextlib
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from PIL import Image

from scripts.benchmarks.schemas import SCHEMAS
from scripts.demo_model.signs import COMMON_WORDS
from xgenmm import (
    Answer,
    Engine,
    EngineError,
    InputError,
    Message,
    Request,
    SamplingParams,
    read_image,
)

REFUSED = "refused"
COMPLETE = frozenset({"end", "stop", "length"})


@dataclass(frozen=True)
class Client:
    """What one client does.

    make_request: may raise InputError itself.
    outcomes: the stop reasons that are right, or `REFUSED`.
    chunks: how many it reads before it leaves; None for all.
    cancels: whether it cancels when it leaves.
    is_async: reads in an event loop of its own, which is closed when the client leaves.
    """

    name: str
    make_request: Callable[[], Request]
    outcomes: frozenset[str]
    chunks: int | None = None
    cancels: bool = False
    is_async: bool = False

    def run(self, engine: Engine) -> "LeftAnswer | None":
        """Ask and read; returns what is left of the answer, or None if it was refused."""
        try:
            answer = engine.stream(self.make_request())
        except InputError:
            return None
        rest = iter(answer)
        with contextlib.suppress(EngineError, InputError):  # the stop reason shows them
            if self.is_async:
                complete = asyncio.run(_read(answer, self.chunks))
                rest = iter(()) if complete else rest
            else:
                for _ in islice(rest, self.chunks):
                    pass
        if self.cancels:
            answer.cancel()
        return LeftAnswer(answer, rest)


@dataclass(frozen=True)
class LeftAnswer:
    """An answer that its client has left, perhaps before its end."""

    answer: Answer
    rest: Iterator[str]

    def outcome(self) -> str:
        """Wait for the end of the answer; returns its stop reason."""
        with contextlib.suppress(EngineError, InputError):
            for _ in self.rest:
                pass
        return self.answer.usage.stop_reason


async def _read(answer: Answer, count: int | None) -> bool:
    """Read `count` chunks; returns whether the answer ended before that."""
    number = 0
    async for _ in answer:
        number += 1
        if number == count:
            return False
    return True


def random_client(rng: random.Random, images: Sequence[Image.Image], engine: Engine) -> Client:
    """A random client; its requests show some of `images`."""
    if rng.random() < 0.15:
        name, make_request = rng.choice(_invalid_requests(rng, images, engine))
        return Client(name, make_request, frozenset({REFUSED}))
    request, behaviour, outcomes = _valid_request(rng, images), rng.random(), COMPLETE
    if request.timeout is not None:
        outcomes |= {"timeout"}
    if behaviour < 0.4:
        chunks, cancels = None, False
    else:
        chunks, cancels = rng.choice((0, 1, rng.randint(2, 20))), behaviour < 0.9
    if cancels:
        outcomes |= {"cancelled"}
    is_async = chunks != 0 and rng.random() < 0.3
    return Client(repr(request), lambda: request, outcomes, chunks, cancels, is_async)


def _valid_request(rng: random.Random, images: Sequence[Image.Image]) -> Request:
    chosen = rng.sample(images, rng.choice((0, 1, 1, 1, 2)))
    sampling = SamplingParams(max_new_tokens=rng.choice((1, rng.randint(2, 12), 48)))
    request = Request("word " * rng.randint(1, 20) + "?", chosen, sampling=sampling)
    settings: dict[str, Any] = rng.choice(
        (
            {},
            {"temperature": rng.uniform(0.1, 2), "top_p": rng.uniform(0.1, 1)},
            {"temperature": 1.0, "top_k": rng.randint(1, 50), "seed": rng.randint(0, 9)},
            {"repetition_penalty": rng.uniform(0.5, 3)},
            {"num_beams": rng.randint(2, 4)},
            {"stop_sequences": (rng.choice("aeiou"),)},
        )
    )
    request = replace(request, sampling=replace(sampling, **settings))
    other: dict[str, Any] = rng.choice(
        (
            {},
            {},
            {"timeout": rng.uniform(0, 0.2)},
            {"choices": tuple(rng.sample(COMMON_WORDS, rng.randint(1, 8)))},
            {"json_schema": rng.choice(SCHEMAS), "sampling": sampling},
            {"messages": (Message("user", "one"), Message("assistant", "two"))},
        )
    )
    # Where there are earlier turns, the question must say where its images go.
    markers = "<image> " * len(chosen) if "messages" in other else ""
    return replace(request, question=markers + request.question, **other)


def _invalid_requests(
    rng: random.Random, images: Sequence[Image.Image], engine: Engine
) -> list[tuple[str, Callable[[], Request]]]:
    """Requests that the engine must refuse, by name."""
    file = io.BytesIO()
    images[0].save(file, "PNG")
    cut = file.getvalue()[: rng.randint(20, len(file.getvalue()) // 2)]
    too_long = "word " * engine.config.decoder.max_positions
    return [
        ("empty file", lambda: Request("?", [read_image(b"")])),
        ("not an image", lambda: Request("?", [read_image(rng.randbytes(99))])),
        ("truncated image", lambda: Request("?", [read_image(cut)])),
        ("no question and no image", lambda: Request(" ")),
        ("two markers for one image", lambda: Request("<image> <image>", images[:1])),
        ("prompt too long", lambda: Request(too_long, images[:1])),
        ("temperature", lambda: Request("?", sampling=SamplingParams(temperature=9))),
        ("no token", lambda: Request("?", sampling=SamplingParams(max_new_tokens=0))),
        ("number of beams", lambda: Request("?", sampling=SamplingParams(num_beams=99))),
        ("empty stop", lambda: Request("?", sampling=SamplingParams(stop_sequences=("",)))),
        ("empty choice", lambda: Request("?", choices=("a", ""))),
        ("equal choices", lambda: Request("?", choices=("a", "a"))),
        ("choices and a schema", lambda: Request("?", choices=("a",), json_schema={})),
        ("invalid schema", lambda: Request("?", json_schema={"type": "word"})),
    ]
