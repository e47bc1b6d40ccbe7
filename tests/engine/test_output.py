"""How requests end."""

from typing import Any, cast

import pytest

from tests.support.engine_requests import RecordingSink, engine_request
from xgenmm.engine.metrics import Metrics
from xgenmm.engine.output import OutputProcessor
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.scheduler import Scheduler, SchedulerConfig
from xgenmm.errors import EngineError, InputError


class FakeRunner:
    """Records calls; `remove_request` raises `error` if it is set."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None

    def remove_request(self, request: EngineRequest) -> None:
        """Record the call, then raise `error` if it is set."""
        self.calls.append("remove")
        if self.error is not None:
            raise self.error

    def cache_prefix(self, request: EngineRequest) -> None:
        """Record the call."""
        self.calls.append("cache")


class Fixture:
    """An output processor with one running request."""

    def __init__(self, **settings: Any) -> None:
        self.runner, self.sink = FakeRunner(), RecordingSink()
        self.scheduler = Scheduler(4, SchedulerConfig())
        self.metrics = Metrics(60.0)
        self.output = OutputProcessor(self.scheduler, cast(Any, self.runner), self.metrics)
        self.request = engine_request(sink=self.sink, **settings)
        self.output.unfinished.add(self.request)
        self.scheduler.add(self.request)
        list(self.scheduler.admit())
        self.request.num_computed_tokens = self.request.num_prompt_tokens


def test_request_ends_at_its_limit_and_is_released() -> None:
    case = Fixture(max_tokens=3)
    for token_id in (7, 8, 9, 10):
        case.output.append_token(case.request, token_id)
    assert case.sink.token_ids == [7, 8, 9]  # the fourth comes from an overlapped step
    assert case.sink.ends == [("length", None)]
    assert case.runner.calls == ["remove", "cache"]
    assert case.scheduler.idle
    assert len(case.scheduler.free_slots) == 4
    assert (case.metrics.totals["length"], case.metrics.totals["output_tokens"]) == (1, 3)


def test_sink_is_notified_even_if_releasing_the_request_fails() -> None:
    case = Fixture()
    case.runner.error = RuntimeError("CUDA error")
    with pytest.raises(RuntimeError, match="CUDA error"):
        case.output.finish(case.request, "cancelled")
    assert case.sink.ends == [("cancelled", None)]
    assert case.scheduler.idle
    case.output.finish(case.request, "cancelled")
    assert len(case.sink.ends) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("json_schema", "is wrong"), "json_schema: is wrong"),
        (ValueError("boom"), r"the request failed in the model: ValueError('boom')"),
    ],
)
def test_failed_request_gets_an_error_and_caches_nothing(error: Exception, message: str) -> None:
    case = Fixture()
    case.output.append_token(case.request, 7)
    case.output.fail([case.request], error)
    ((reason, told),) = case.sink.ends
    assert reason == "failed"
    assert isinstance(told, InputError | EngineError)
    assert str(told) == message
    assert case.runner.calls == ["remove"]
