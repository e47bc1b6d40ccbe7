"""`Predictor` without a server or model: settings, cancellation, failures, health.

Predictions are started, iterated over and cancelled the way Cog's worker does it.
"""

import asyncio
import inspect
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from cog import CancelationException

import xgenmm
from predict import Predictor
from xgenmm.config import XGenMMConfig
from xgenmm.engine.json_schema import SchemaLimits
from xgenmm.engine.sampling_params import MOST_BEAMS
from xgenmm.errors import EngineError, InputError
from xgenmm.preprocessing.decoders import ImageDecoders
from xgenmm.preprocessing.fetch import FetchLimits

WAIT = 10.0
INPUTS: dict[str, Any] = {
    name: parameter.default.default
    for name, parameter in inspect.signature(Predictor.predict).parameters.items()
    if name != "self"
}
SETTINGS = (
    "XGENMM_MODEL",
    "XGENMM_ADAPTER",
    "COG_WEIGHTS",
    "XGENMM_DEVICE",
    "XGENMM_DTYPE",
    "XGENMM_QUANTIZE",
    "XGENMM_DECODE",
    "XGENMM_MEMORY",
    "XGENMM_TIMEOUT",
    "XGENMM_FETCH_SECONDS",
    "XGENMM_FETCH_BYTES",
    "XGENMM_DECODE_SECONDS",
    "XGENMM_VIDEO_FILE_BYTES",
    "XGENMM_ADAPTER_BYTES",
    "XGENMM_ADAPTER_SECONDS",
    "XGENMM_PRIVATE_ADDRESSES",
    "COG_MAX_CONCURRENCY",
)


@dataclass(frozen=True)
class Usage:
    output_tokens: int = 1
    choices: dict[str, float] | None = None


class SilentAnswer:
    """Yields one piece of text, then blocks until it is cancelled."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.cancelled = threading.Event()

    def pieces(self, interval: float) -> Iterator[str]:
        assert interval <= 0.05
        yield "one "
        assert self.cancelled.wait(WAIT), "the answer was not cancelled"

    def cancel(self) -> None:
        self.cancelled.set()


class BrokenAnswer(SilentAnswer):
    def pieces(self, interval: float) -> Iterator[str]:
        yield "one "
        raise EngineError("the device is gone")


class Engine:
    """Returns one prepared answer and records its requests and load arguments."""

    config = XGenMMConfig()

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

    def warm_up(self, *, schemas: bool) -> None:
        """Nothing to do."""

    def check_takes_video(self) -> None:
        raise InputError("video", "this model takes no videos")

    def check(self) -> None:
        if self.failure:
            raise self.failure

    def close(self) -> None:
        """Nothing to do."""


def predictor(monkeypatch: pytest.MonkeyPatch, engine: Engine, **settings: str) -> Predictor:
    """A predictor after `setup`, with only these environment variables set."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(xgenmm, "load", engine.load)
    monkeypatch.setattr("predict.ImageDecoders", create_autospec(ImageDecoders))
    made = Predictor()
    made.setup()
    return made


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in its own thread, as in Cog's worker."""
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
    """Start a prediction; returns its text generator and the future that Cog cancels it by."""
    future: Future[Any] = asyncio.run_coroutine_threadsafe(made.predict(**INPUTS | inputs), loop)
    return future.result(WAIT), future


def test_setup_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    predictor(monkeypatch, engine)
    nothing: dict[str, Any] = {
        "adapter": None,
        "device": None,
        "dtype": None,
        "quantize": None,
        "max_num_seqs": MOST_BEAMS,
        "gpu_memory_utilization": 0.9,
        "decode": "auto",
        "schema_limits": SchemaLimits(),
    }
    assert engine.loaded == ("xgen-mm-phi3-mini-instruct-interleave-r-v1.5", nothing)
    predictor(
        monkeypatch,
        engine,
        XGENMM_MODEL="demo",
        COG_WEIGHTS="mine.tar",
        XGENMM_DEVICE="cpu",
        XGENMM_DTYPE="float32",
        XGENMM_QUANTIZE="int8",
        XGENMM_MEMORY="0.5",
        XGENMM_DECODE="plain",
        XGENMM_SCHEMA_DEPTH="7",
        XGENMM_SCHEMA_SECONDS="0.5",
        COG_MAX_CONCURRENCY="12",
    )
    named: dict[str, Any] = {
        "adapter": Path("mine.tar"),
        "device": "cpu",
        "dtype": "float32",
        "quantize": "int8",
        "gpu_memory_utilization": 0.5,
        "decode": "plain",
        "max_num_seqs": 12,
        "schema_limits": SchemaLimits(depth=7, seconds=0.5),
    }
    assert engine.loaded == ("demo", named)


@pytest.mark.parametrize(
    "name",
    [
        "XGENMM_TIMEOUT",
        "XGENMM_MEMORY",
        "XGENMM_FETCH_SECONDS",
        "XGENMM_FETCH_BYTES",
        "XGENMM_DECODE_SECONDS",
        "XGENMM_ADAPTER_SECONDS",
        "XGENMM_ADAPTER_BYTES",
        "COG_MAX_CONCURRENCY",
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_setup_rejects_a_setting_that_is_not_a_positive_number(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises(InputError, match=f"^{name}: must be a number above 0, not '{value}'"):
        predictor(monkeypatch, Engine(), **{name: value})


def test_setup_reads_the_limits_of_images_and_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    made = predictor(monkeypatch, Engine())
    limits = made.settings.fetch_limits
    assert limits["image"] == FetchLimits(30, 128_000_000, private_addresses=False)
    assert limits["video"] == FetchLimits(30, 512_000_000, private_addresses=False)
    assert limits["adapter"] == FetchLimits(300, 1_000_000_000, private_addresses=False)
    settings = {
        "FETCH_SECONDS": "1.5",
        "FETCH_BYTES": "9",
        "VIDEO_FILE_BYTES": "10",
        "ADAPTER_BYTES": "11",
        "PRIVATE_ADDRESSES": "1",
    }
    made = predictor(
        monkeypatch, Engine(), **{f"XGENMM_{name}": value for name, value in settings.items()}
    )
    limits = made.settings.fetch_limits
    assert limits["image"] == FetchLimits(1.5, 9, private_addresses=True)
    assert limits["video"] == FetchLimits(1.5, 10, private_addresses=True)
    assert limits["adapter"] == FetchLimits(300, 11, private_addresses=True)
    with pytest.raises(InputError, match=r"^XGENMM_PRIVATE_ADDRESSES: must be 0 or 1, not 'yes'"):
        predictor(monkeypatch, Engine(), XGENMM_PRIVATE_ADDRESSES="yes")


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


def test_choices_need_no_settings_that_go_together(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine = Engine()
    made = predictor(monkeypatch, engine)
    inputs = {"question": "?", "choices": ["yes", "no"], "temperature": 1.0, "num_beams": 4}
    next(start(made, loop, **inputs)[0])
    assert engine.requests[0].choices == ("yes", "no")


def test_conversation_in_messages_reaches_the_request(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine = Engine()
    made = predictor(monkeypatch, engine)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    next(start(made, loop, messages=messages)[0])
    (request,) = engine.requests
    assert (request.system_prompt, request.messages, request.question) == ("Be brief.", (), "Hi")


def test_video_is_refused_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    made = predictor(monkeypatch, Engine())
    monkeypatch.setattr("serving.inputs.start_fetch", None)
    with pytest.raises(InputError, match=r"^video: this model takes no videos"):
        start(made, loop, video="https://example.com/clip.mp4")


def test_cancel_while_waiting_for_text(
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


def test_cancel_before_iteration_starts(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine = Engine()
    texts, future = start(predictor(monkeypatch, engine), loop, question="?")
    assert not engine.requests, "generation started before Cog iterated"
    future.cancel()
    with pytest.raises(CancelationException):
        list(texts)
    assert engine.answer.cancelled.is_set()


def test_cancel_affects_one_prediction_only(
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


def test_closing_the_generator_cancels_the_answer(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    engine = Engine()
    texts, _ = start(predictor(monkeypatch, engine), loop, question="?")
    next(texts)
    texts.close()
    assert engine.answer.cancelled.is_set()


def test_engine_failure_is_raised_after_the_text_so_far(
    monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop
) -> None:
    texts, _ = start(predictor(monkeypatch, Engine(BrokenAnswer())), loop, question="?")
    assert next(texts) == "one "
    with pytest.raises(EngineError, match="the device is gone"):
        next(texts)


def test_healthcheck_reports_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    made = predictor(monkeypatch, engine)
    assert made.healthcheck()
    engine.failure = EngineError("no step for 60 s")
    with pytest.raises(EngineError, match="no step for 60 s"):
        made.healthcheck()


def test_missing_cancellation_hook_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = predictor(monkeypatch, Engine())
    asyncio.run(made.predict(**INPUTS | {"question": "?"}))  # not started the way Cog does it
    assert "cancelling has no effect" in caplog.text
