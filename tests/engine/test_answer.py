"""The pieces of text that a caller gets, without an engine."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.paths import DEMO
from xgenmm import Answer, EngineError
from xgenmm.checkpoints.registry import read_config
from xgenmm.preprocessing.tokenizer import Tokenizer

WAIT = 60.0
FIRST, *REST = IDS = tuple(range(305, 311))  # words with a space before each


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = read_config(DEMO)
    return Tokenizer.from_folder(DEMO, config.text.convention, config.additional_ids)


@pytest.fixture
def answer(tokenizer: Tokenizer) -> Answer:
    """An answer with one token of text."""
    made = Answer(tokenizer, frozenset(), (), ())
    made.token(FIRST)
    return made


@pytest.fixture
def reader() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_first_piece_comes_at_once_and_the_end_ends_the_interval(
    answer: Answer, tokenizer: Tokenizer, reader: ThreadPoolExecutor
) -> None:
    pieces = answer.pieces(WAIT)
    first = next(pieces)
    rest = reader.submit(list, pieces)
    for token_id in REST:
        answer.token(token_id)
    started = time.monotonic()
    answer.end("length", None)
    assert [first, *rest.result()] == [
        tokenizer.decode([FIRST]),
        tokenizer.decode(IDS)[len(first) :],
    ]
    assert time.monotonic() - started < WAIT


def test_pieces_are_an_interval_apart_while_text_waits(
    answer: Answer, tokenizer: Tokenizer
) -> None:
    interval = 0.05
    pieces = answer.pieces(interval)
    started = time.monotonic()
    text = next(pieces)
    for token_id in REST:
        answer.token(token_id)
    text += next(pieces)
    assert time.monotonic() - started >= interval
    assert text == tokenizer.decode(IDS)


def test_cancelling_drops_the_text_that_waits(answer: Answer, reader: ThreadPoolExecutor) -> None:
    pieces = answer.pieces(WAIT)
    next(pieces)
    rest = reader.submit(list, pieces)
    answer.cancel()
    answer.token(REST[0])
    answer.end("cancelled", None)
    assert rest.result() == []


def test_text_before_an_error_is_yielded(answer: Answer, tokenizer: Tokenizer) -> None:
    answer.end("failed", EngineError("the device is gone"))
    pieces = answer.pieces(WAIT)
    assert next(pieces) == tokenizer.decode([FIRST])
    with pytest.raises(EngineError, match="the device is gone"):
        next(pieces)
