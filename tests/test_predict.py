"""Cog's face alone: an answer passed on, cancelled, failing. The server's tests do the rest."""

import ctypes
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cog import CancelationException

import xgenmm
from predict import Predictor

WAIT = 10.0
INPUTS: dict[str, Any] = {
    name: parameter.default.default
    for name, parameter in inspect.signature(Predictor.predict).parameters.items()
    if name != "self"
}


@dataclass(frozen=True)
class Usage:
    output_tokens: int


class SilentAnswer:
    """Makes a token each time the test says `go`, and no text until it is cancelled."""

    def __init__(self) -> None:
        self.started, self.go, self.cancelled = (threading.Event() for _ in range(3))
        self.tokens = 0

    @property
    def usage(self) -> Usage:
        return Usage(self.tokens)

    def __iter__(self) -> Iterator[str]:
        while not self.cancelled.is_set():
            self.started.set()
            assert self.go.wait(WAIT)
            self.tokens += 1
        yield "the end"

    def cancel(self) -> None:
        self.cancelled.set()


class BrokenAnswer(SilentAnswer):
    def __iter__(self) -> Iterator[str]:
        yield "one "
        raise RuntimeError("the device is gone")


class Engine:
    """Gives out one prepared answer."""

    def __init__(self, answer: SilentAnswer) -> None:
        self.answer = answer

    def stream(self, request: object) -> SilentAnswer:
        return self.answer


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of an answer: a predictor that gives it."""

    def predictor(answer: SilentAnswer) -> Predictor:
        monkeypatch.setattr(xgenmm, "load", lambda *names, **options: Engine(answer))
        made = Predictor()
        made.setup()
        return made

    return predictor


def test_setup_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(xgenmm, "load", lambda *names, **options: loaded.append((names, options)))
    for variable in ("XGENMM_MODEL", "XGENMM_DEVICE", "XGENMM_DTYPE"):
        monkeypatch.delenv(variable, raising=False)
    Predictor().setup()
    monkeypatch.setenv("XGENMM_MODEL", "demo")
    monkeypatch.setenv("XGENMM_DEVICE", "cpu")
    monkeypatch.setenv("XGENMM_DTYPE", "float32")
    Predictor().setup()
    main = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"
    assert loaded == [
        ((main,), {"device": None, "dtype": None}),
        (("demo",), {"device": "cpu", "dtype": "float32"}),
    ]


def test_cancel_stops_after_the_token_at_work(answering: Any) -> None:
    answer = SilentAnswer()
    predictor = answering(answer)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            list(predictor.predict(**INPUTS | {"question": "?"}))
        except CancelationException as cancelled:
            ended.append(cancelled)

    thread = threading.Thread(target=run)
    thread.start()
    assert answer.started.wait(WAIT)
    # As Cog's server does it.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(CancelationException)
    )
    assert answer.cancelled.wait(WAIT), "cancelling waited for a text"
    assert thread.is_alive(), "the model is still at work on its token"
    answer.go.set()
    thread.join(WAIT)
    assert len(ended) == 1
    assert answer.tokens == 1


def test_failure_in_the_model_reaches_the_client_after_the_texts(answering: Any) -> None:
    texts = answering(BrokenAnswer()).predict(**INPUTS | {"question": "?"})
    assert next(texts) == "one "
    with pytest.raises(RuntimeError, match="the device is gone"):
        next(texts)
