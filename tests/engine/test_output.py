"""How requests end."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.engine_requests import RecordingSink, engine_request
from xgenmm.engine.block_manager import BlockManager
from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.metrics import Metrics
from xgenmm.engine.output import OutputProcessor
from xgenmm.engine.request import ChoiceScore
from xgenmm.engine.scheduler import Scheduler, SchedulerConfig
from xgenmm.errors import EngineError, InputError


class FakeRunner:
    """Records the rows that are freed; `free_rows` raises `error` if it is set."""

    def __init__(self) -> None:
        self.decode_path = SimpleNamespace(name="kernels")
        self.freed: list[int] = []
        self.error: Exception | None = None

    def free_rows(self, rows: Sequence[int]) -> None:
        """Record the rows, then raise `error` if it is set."""
        self.freed += rows
        if self.error is not None:
            raise self.error


class Fixture:
    """An output processor with one request whose prompt is computed."""

    def __init__(self, *, end_id: int | None = None, **settings: Any) -> None:
        self.runner, self.sink = FakeRunner(), RecordingSink(end_id)
        self.blocks = BlockManager(8)
        self.scheduler = Scheduler(4, self.blocks, LRUCache[Any](0), SchedulerConfig())
        self.metrics = Metrics(60.0)
        self.output = OutputProcessor(self.scheduler, cast(Any, self.runner), self.metrics)
        self.request = engine_request(40, sink=self.sink, **settings)
        self.output.unfinished.add(self.request)
        self.scheduler.add(self.request)
        self.scheduler.update(self.scheduler.schedule())

    def assert_released(self) -> None:
        """Nothing is left of the request but what can be found again."""
        assert self.scheduler.idle
        assert self.output.unfinished == set()
        assert self.scheduler.free_rows == {0, 1, 2, 3}
        assert self.blocks.num_free == 8


def test_request_ends_at_its_limit_and_is_released() -> None:
    case = Fixture(max_tokens=3)
    for token_id in (7, 8, 9, 10):
        case.output.append_token(case.request, token_id)
    assert case.sink.token_ids == [7, 8, 9]  # the fourth comes from an overlapped step
    assert case.sink.ends == [("length", None)]
    assert case.runner.freed == [0]
    case.assert_released()
    assert (case.metrics.totals["length"], case.metrics.totals["output_tokens"]) == (1, 3)


def test_request_ends_when_its_sink_says_so() -> None:
    case = Fixture(end_id=8)
    for token_id in (7, 8, 9):
        case.output.append_token(case.request, token_id)
    assert case.sink.token_ids == [7, 8]
    assert case.sink.ends == [("end", None)]
    usage = case.request.usage
    assert (usage.stop_reason, usage.output_tokens) == ("end", 2)
    assert usage.time_to_first_token > 0
    assert usage.tokens_per_second > 0


def test_grammar_follows_the_tokens_up_to_the_limit() -> None:
    """Nothing waits for the mask that tells whether the JSON is complete."""
    case = Fixture(max_tokens=3)
    advanced: list[int] = []
    case.request.grammar = cast(Any, SimpleNamespace(advance=advanced.append))
    for token_id in (7, 8, 9, 10):
        case.output.append_token(case.request, token_id)
    assert advanced == case.sink.token_ids == [7, 8, 9]
    assert case.sink.ends == []


@pytest.mark.parametrize(
    ("end_id", "passed_on", "reason"), [(8, [7, 8], "end"), (None, [7, 8, 9], "length")]
)
def test_answer_of_a_beam_search_is_passed_on(
    end_id: int | None, passed_on: list[int], reason: str
) -> None:
    case = Fixture(end_id=end_id, num_beams=3)
    case.output.finish_beams(case.request, [7, 8, 9])
    assert case.sink.token_ids == passed_on
    assert case.sink.ends == [(reason, None)]
    assert case.request.usage.output_tokens == len(passed_on)
    assert case.runner.freed == [0, 1, 2]
    case.assert_released()


def test_most_likely_choice_is_the_answer() -> None:
    case = Fixture(choices=[[1, 2], [3, 4, 5]])
    case.output.finish_choice(case.request, [ChoiceScore(-2.0, True), ChoiceScore(-1.0, False)])
    assert case.sink.token_ids == [1]
    assert case.sink.ends == [("end", None)]
    assert case.request.usage.output_tokens == 3
    case.assert_released()


def test_waiting_request_can_be_finished() -> None:
    case = Fixture()
    waiting = engine_request(500, sink=RecordingSink())  # more than the cache has blocks for
    case.output.unfinished.add(waiting)
    case.scheduler.add(waiting)
    case.output.finish(waiting, "timeout")
    assert cast(RecordingSink, waiting.sink).ends == [("timeout", None)]
    assert case.scheduler.running == [case.request]
    case.output.finish(case.request, "cancelled")
    case.assert_released()


def test_usage_tells_preemptions_and_what_computed_the_tokens() -> None:
    case = Fixture()
    case.request.num_preemptions = 2
    case.output.finish(case.request, "cancelled")
    usage = case.request.usage
    assert (usage.preemptions, usage.decode_path, usage.stop_reason) == (2, "kernels", "cancelled")


def test_sink_is_notified_even_if_releasing_the_rows_fails() -> None:
    case = Fixture()
    case.runner.error = RuntimeError("CUDA error")
    with pytest.raises(RuntimeError, match="CUDA error"):
        case.output.finish(case.request, "cancelled")
    assert case.sink.ends == [("cancelled", None)]
    case.assert_released()
    case.output.finish(case.request, "cancelled")
    assert len(case.sink.ends) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("json_schema", "is wrong"), "json_schema: is wrong"),
        (ValueError("boom"), r"the request failed in the model: ValueError('boom')"),
    ],
)
def test_failed_request_gets_an_error(error: Exception, message: str) -> None:
    case = Fixture()
    case.output.append_token(case.request, 7)
    case.output.fail([case.request], error)
    ((reason, told),) = case.sink.ends
    assert reason == "failed"
    assert isinstance(told, InputError | EngineError)
    assert str(told) == message
    assert case.runner.freed == [0]
    case.assert_released()
