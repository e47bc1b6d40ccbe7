"""Cog's face alone: settings, cancelling, failing, health. The server's tests do the rest.

Predictions are started, gone through and cancelled here as Cog's worker does it.
"""

import asyncio
import inspect
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from cog import CancelationException

import xgenmm
from predict import Predictor
from xgenmm.engine.sampling_params import MOST_BEAMS
from xgenmm.errors import EngineError, InputError

WAIT = 10.0
INPUTS: dict[str, Any] = {
    name: parameter.default.default
    for name, parameter in inspect.signature(Predictor.predict).parameters.items()
    if name != "self"
}
SETTINGS = (
    "XGENMM_MODEL",
    "XGENMM_DEVICE",
    "XGENMM_DTYPE",
    "XGENMM_QUANTIZE",
    "XGENMM_TIMEOUT",
    "COG_MAX_CONCURRENCY",
)


@dataclass(frozen=True)
class Usage:
    output_tokens: int = 1
    choices: dict[str, float] | None = None


class SilentAnswer:
    """Gives one text and then none until it is cancelled."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        yield "one "
        assert self.cancelled.wait(WAIT), "nobody cancels"

    def cancel(self) -> None:
        self.cancelled.set()


class BrokenAnswer(SilentAnswer):
    def __iter__(self) -> Iterator[str]:
        yield "one "
        raise EngineError("the device is gone")


class Engine:
    """Gives out one prepared answer, and keeps what it was asked and loaded with."""

    def __init__(self, answer: SilentAnswer | None = None) -> None:
        self.answer = answer or SilentAnswer()
        self.requests: list[xgenmm.Request] = []
        self.loaded: tuple[Any, ...] = ()
        self.failure: EngineError | None = None

    def load(self, *names: Any, **options: Any) -> "Engine":
        self.loaded = (*names, options)
        return self

    def stream(self, request: xgenmm.Request) -> SilentAnswer:
        self.requests.append(request)
        return self.answer

    def warm_up(self) -> None:
        """There is nothing to warm."""

    def check(self) -> None:
        if self.failure:
            raise self.failure

    def close(self) -> None:
        """There is nothing to close."""


def predictor(monkeypatch: pytest.MonkeyPatch, engine: Engine, **settings: str) -> Predictor:
    """A predictor that is set up, with these environment variables and no others."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(xgenmm, "load", engine.load)
    made = Predictor()
    made.setup()
    return made


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own, as Cog's does."""
    running = asyncio.new_event_loop()
    thread = threading.Thread(target=running.run_forever)
    thread.start()
    yield running
    running.call_soon_threadsafe(running.stop)
    thread.join()
    running.close()


def start(
    made: Predictor, loop: asyncio.AbstractEventLoop, **inputs: Any
) -> tuple[Generator[str, None, None], Future[Any]]:
    """A prediction's texts, and the future by which Cog cancels it."""
    future: Future[Any] = asyncio.run_coroutine_threadsafe(made.predict(**INPUTS | inputs), loop)
    return future.result(WAIT), future


def test_setup_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    predictor(monkeypatch, engine)
    nothing = {"device": None, "dtype": None, "quantize": None, "max_num_seqs": MOST_BEAMS}
    assert engine.loaded == ("xgen-mm-phi3-mini-instruct-interleave-r-v1.5", nothing)
    predictor(
        monkeypatch,
        engine,
        XGENMM_MODEL="demo",
        XGENMM_DEVICE="cpu",
        XGENMM_DTYPE="float32",
        XGENMM_QUANTIZE="int8",
        COG_MAX_CONCURRENCY="12",
    )
    named = {"device": "cpu", "dtype": "float32", "quantize": "int8"}
    assert engine.loaded == ("demo", {**named, "max_num_seqs": 12})


@pytest.mark.parametrize("name", ["XGENMM_TIMEOUT", "COG_MAX_CONCURRENCY"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_setup_refuses_a_setting_that_is_no_number_above_0(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises(InputError, match=f"^{name}: must be a number above 0, not '{value}'"):
        predictor(monkeypatch, Engine(), **{name: value})


def test_inputs_and_settings_reach_the_request(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine = Engine()
    made = predictor(monkeypatch, engine, XGENMM_TIMEOUT="2.5")
    next(start(made, loop, question="?", choices=["yes", "no"], json_schema={})[0])
    (request,) = engine.requests
    assert request.timeout == 2.5
    assert request.choices == ("yes", "no")
    assert request.json_schema == {}
    assert request.sampling == xgenmm.SamplingParams()


def test_cancel_reaches_an_answer_between_texts(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine = Engine()
    texts, future = start(predictor(monkeypatch, engine), loop, question="?")
    assert next(texts) == "one "
    with ThreadPoolExecutor(1) as worker:
        waiting = worker.submit(next, texts)
        assert not engine.answer.cancelled.is_set()
        future.cancel()
        assert isinstance(waiting.exception(WAIT), CancelationException)


def test_cancel_before_the_first_text(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine = Engine()
    texts, future = start(predictor(monkeypatch, engine), loop, question="?")
    assert not engine.requests, "an answer that Cog does not fetch is never begun"
    future.cancel()
    with pytest.raises(CancelationException):
        list(texts)
    assert engine.answer.cancelled.is_set()


def test_cancel_is_for_one_prediction_alone(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine, other = Engine(), SilentAnswer()
    made = predictor(monkeypatch, engine)
    texts, future = start(made, loop, question="?")
    next(texts)
    first, engine.answer = engine.answer, other
    other_texts, _ = start(made, loop, question="?")
    next(other_texts)
    future.cancel()
    assert first.cancelled.is_set()
    assert not other.cancelled.is_set()


def test_answer_that_cog_no_longer_fetches_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine = Engine()
    texts, _ = start(predictor(monkeypatch, engine), loop, question="?")
    next(texts)
    texts.close()
    assert engine.answer.cancelled.is_set()


def test_failure_in_the_model_reaches_the_client_after_the_texts(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    texts, _ = start(predictor(monkeypatch, Engine(BrokenAnswer())), loop, question="?")
    assert next(texts) == "one "
    with pytest.raises(EngineError, match="the device is gone"):
        next(texts)


def test_health_is_the_engine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    made = predictor(monkeypatch, engine)
    assert made.healthcheck()
    engine.failure = EngineError("no step for 60 s")
    with pytest.raises(EngineError, match="no step for 60 s"):
        made.healthcheck()
