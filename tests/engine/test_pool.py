"""Several schedulers over one model, as a small one gets on a CPU."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
import torch

import xgenmm
from tests.engine.test_scheduler import asking, assert_all_free
from tests.support import tiny
from xgenmm import Engine, Request, SamplingParams
from xgenmm.engine.reference import answer_text as alone
from xgenmm.engine.scheduler import EngineRequest, Scheduler

COLORS = ("red", "green", "blue", "black", "white", "orange")


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def engine(two_cores: None, tmp_path: Path) -> Iterator[Engine]:
    started = xgenmm.load(
        tiny.checkpoint(tmp_path), device="cpu", max_num_seqs=17, cache_bytes=1 << 24
    )
    yield started
    started.close()
    assert_all_free(started)


@contextmanager
def occupied(scheduler: Scheduler) -> Iterator[None]:
    """The scheduler has a job that never ends."""
    job = cast(EngineRequest, object())
    scheduler._jobs.add(job)
    yield
    scheduler._jobs.remove(job)


def test_both_schedulers_answer_and_as_one_request_alone(engine: Engine) -> None:
    first, second = engine._pool.schedulers
    assert (first.slots, second.slots, engine.max_num_seqs) == (9, 8, 17)
    requests = [asking(f"Number {i}?", color) for i in range(6) for color in COLORS]
    answers = [engine.stream(request) for request in requests]
    for answer, request in zip(answers, requests, strict=True):
        assert answer.text() == alone(engine, request)
    assert all(scheduler._counts["steps"] for scheduler in (first, second))


def test_what_one_scheduler_has_seen_the_other_knows(engine: Engine) -> None:
    first, second = engine._pool.schedulers
    asked, again = asking("What is it?", "red"), asking("Which color?", "red")
    engine.stream(asked).text()
    with occupied(first):
        answer = engine.stream(again)
        assert answer.text() == alone(engine, again)
    assert answer.usage.cached_tokens > answer.usage.image_tokens
    assert (first._counts["tiles"] > 0, second._counts["tiles"]) == (True, 0)


def test_a_lone_request_takes_all_cores(engine: Engine) -> None:
    first, second = engine._pool.schedulers
    assert engine._pool._threads() == 2
    with occupied(second):
        assert engine._pool._threads() == 2
        with occupied(first):
            assert engine._pool._threads() == 1


def test_every_search_fits_a_scheduler(engine: Engine) -> None:
    request = Request("What is it?", sampling=SamplingParams(8, num_beams=8))
    answers = [engine.stream(request) for _ in range(3)]
    assert [answer.text() for answer in answers] == [alone(engine, request)] * 3


def test_few_slots_are_not_shared_out(two_cores: None, tmp_path: Path) -> None:
    few = xgenmm.load(tiny.checkpoint(tmp_path), device="cpu", max_num_seqs=15)
    assert len(few._pool.schedulers) == 1
    few.close()


def test_a_program_may_end_in_mid_answer(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path)
    program = f"""
import torch, xgenmm
torch.set_num_threads(2)
engine = xgenmm.load({str(folder)!r}, device="cpu")
sampling = xgenmm.SamplingParams(max_new_tokens=2000)
questions = [xgenmm.Request(f"Number {{i}}?", sampling=sampling) for i in range(16)]
answers = [engine.stream(question) for question in questions]
print(next(iter(answers[0])), engine._pool.schedulers[0].busy > 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["True"]), done.stderr
