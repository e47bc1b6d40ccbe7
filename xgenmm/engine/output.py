"""Delivers tokens to the requests' output sinks, and ends requests."""

import logging
import time
from collections.abc import Iterable, Sequence

from xgenmm.engine.metrics import Metrics
from xgenmm.engine.model_runner import ModelRunner
from xgenmm.engine.request import ChoiceScore, EngineRequest, StopReason
from xgenmm.engine.scheduler import Scheduler
from xgenmm.errors import EngineError, InputError

logger = logging.getLogger(__name__)


class OutputProcessor:
    """Passes output on and releases what a finished request holds.

    unfinished: the accepted requests whose sink has not received `end`. Other threads may read
        it and add to it.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, metrics: Metrics) -> None:
        self.unfinished: set[EngineRequest] = set()
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics

    def append_token(self, request: EngineRequest, token_id: int) -> None:
        """Pass the next token on, and finish the request if it is complete.

        A request that has finished in the meantime gets no more tokens. One with a grammar is not
        finished at its limit: that the JSON is complete is known only with the next mask.
        """
        at_limit = len(request.output_token_ids) == request.max_tokens
        if at_limit or request not in self.unfinished:
            return
        usage = request.usage
        if not request.output_token_ids:
            usage.time_to_first_token = time.monotonic() - request.started
        request.output_token_ids.append(token_id)
        usage.output_tokens += 1
        if request.grammar is not None:
            request.grammar.advance(token_id)
        reason = request.sink.token(token_id)
        at_limit = len(request.output_token_ids) == request.max_tokens
        if reason is None and at_limit and request.grammar is None:
            reason = "length"
        if reason is not None:
            self.finish(request, reason)

    def finish_beams(self, request: EngineRequest, token_ids: Iterable[int]) -> None:
        """Pass on the whole answer of a beam search and finish the request."""
        reason: StopReason | None = None
        for token_id in token_ids:
            request.usage.output_tokens += 1
            reason = request.sink.token(token_id)
            if reason is not None:
                break
        self.finish(request, reason or "length")

    def finish_choice(self, request: EngineRequest, scores: Sequence[ChoiceScore]) -> None:
        """Answer with the most likely choice and finish the request."""
        best = scores.index(max(scores))
        request.usage.output_tokens = len(request.choices[best])
        request.usage.time_to_first_token = time.monotonic() - request.started
        request.sink.chosen(best, scores)
        self.finish(request, "end")

    def fail(self, requests: Sequence[EngineRequest], error: Exception) -> None:
        """End requests with an error: an InputError is passed on, others become an EngineError."""
        if not isinstance(error, InputError):
            error = EngineError(f"the request failed in the model: {error!r}")
        for request in requests:
            self.finish(request, "failed", error)

    def finish(
        self, request: EngineRequest, reason: StopReason, error: Exception | None = None
    ) -> None:
        """Release everything the request holds and end its sink, once.

        The sink is ended even if the release fails, for example after a CUDA error.
        """
        if request not in self.unfinished:
            return
        self.unfinished.remove(request)
        try:
            self._runner.free_rows(request.rows)
        finally:
            self._scheduler.remove(request)
            usage = request.usage
            usage.stop_reason, usage.preemptions = reason, request.num_preemptions
            usage.decode_path = self._runner.decode_path.name
            usage.tokens_per_second = usage.output_tokens / (time.monotonic() - request.started)
            self._metrics.finish(usage)
            _end_sink(request, reason, error)


def _end_sink(request: EngineRequest, reason: StopReason, error: Exception | None) -> None:
    try:
        request.sink.end(reason, error)
    except Exception:
        logger.exception("the output sink of a request failed at its end")
