"""One iteration of the engine: the scheduler decides, the runner computes, output is delivered.

On a GPU, a decode step begins before the host has seen the tokens of the step before, so that the
device never waits for the host. A request that has finished then computes one more token, which is
discarded.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeVar

import torch

from xgenmm.engine.beam_search import BeamSearch
from xgenmm.engine.choices import score_choices
from xgenmm.engine.metrics import Metrics
from xgenmm.engine.model_runner import ModelRunner, StepOutput
from xgenmm.engine.output import OutputProcessor
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.scheduler import EncodeBatch, PrefillBatch, Scheduler, SchedulerConfig
from xgenmm.models.xgenmm import XGenMM, padded_length

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EngineCore:
    """Answers requests, one `step` at a time. Not thread-safe.

    Args:
        end_ids: the tokens that end a beam.
        num_slots: maximum number of requests (or beams) in the batch.
        cache_bytes: memory for image features and prefixes of earlier requests.
    """

    def __init__(
        self,
        model: XGenMM,
        end_ids: Collection[int],
        num_slots: int,
        cache_bytes: int,
        config: SchedulerConfig,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(num_slots, config, padded_length)
        self.runner = ModelRunner(model, num_slots, cache_bytes)
        self.metrics = Metrics(config.summary_seconds)
        self.output = OutputProcessor(self.scheduler, self.runner, self.metrics)
        self._end_ids = frozenset(end_ids)
        self._step_outputs: deque[StepOutput] = deque()

    def step(self, *, cancel_all: bool = False) -> None:
        """Do a limited amount of prefill work, then one decode step for all decoding requests."""
        self._end_requests(cancel_all)
        for request in self.scheduler.admit():
            self._run_guarded([request], partial(self._begin, request))
        for _ in range(self.config.prefill_batches_per_step):
            work = self.scheduler.prefill_work()
            if isinstance(work, EncodeBatch):
                self._encode(work)
            elif isinstance(work, PrefillBatch):
                self._prefill(work)
        self._decode()
        self.metrics.log_summary(len(self.scheduler.running), len(self.scheduler.waiting))

    def _end_requests(self, cancel_all: bool) -> None:
        """Finish the requests that are cancelled or past their deadline."""
        scheduler = self.scheduler
        cancelled = (
            [*scheduler.running, *scheduler.waiting] if cancel_all else scheduler.cancelled()
        )
        for request in cancelled:
            self.output.finish(request, "cancelled")
        for request in scheduler.expired(time.monotonic()):
            self.output.finish(request, "timeout")

    def _begin(self, request: EngineRequest) -> None:
        request.admitted = time.monotonic()
        request.usage.queue_time = request.admitted - request.started
        self.runner.add_request(request)
        if request.num_slots > 1:
            request.beam_search = BeamSearch(request.num_slots, self._end_ids, request.max_tokens)
        self.metrics.totals["prompt_tokens"] += request.num_prompt_tokens
        self.metrics.totals["cached_tokens"] += request.usage.cached_tokens

    def _encode(self, batch: EncodeBatch) -> None:
        def encode() -> None:
            self.runner.encode(batch)
            self.metrics.totals["tiles_encoded"] += batch.num_tiles

        self._run_guarded(batch.requests, encode)

    def _prefill(self, batch: PrefillBatch) -> None:
        for chunk in batch.chunks:
            if chunk.request.embeds is None:
                merge = partial(self.runner.merge_embeddings, chunk.request)
                self._run_guarded([chunk.request], merge)
        chunks = [chunk for chunk in batch.chunks if chunk.request in self.output.unfinished]
        if not chunks:
            return
        requests = [chunk.request for chunk in chunks]
        logits = self._run_guarded(requests, partial(self.runner.prefill, chunks))
        if logits is None:
            return
        for chunk, row in zip(chunks, logits, strict=True):
            request = chunk.request
            request.num_computed_tokens += chunk.length
            if request.decoding:
                self._run_guarded([request], partial(self._begin_output, request, row[None]))

    def _begin_output(self, request: EngineRequest, logits: torch.Tensor) -> None:
        """Start the answer from the logits [1, vocab] after the prompt."""
        now = time.monotonic()
        request.embeds = None
        request.usage.prefill_time = now - request.admitted
        runner = self.runner
        runner.cache_prefix(request)
        if request.choices:
            limit = self.config.max_chunk_tokens
            scores = score_choices(runner.model, runner.kv_cache, request, logits, limit)
            self.output.finish_choice(request, scores)
        elif request.beam_search is not None:
            request.usage.time_to_first_token = now - request.started
            self._advance_beams(request, runner.start_beams(request, logits))
        else:
            masks = self._token_masks([request])
            if request in self.output.unfinished:
                mask = masks.get(request.slots[0])
                self._step_outputs.append(runner.sample_first(request, logits, mask))

    def _decode(self) -> None:
        """Begin a decode step, and process the output of earlier ones."""
        overlapped = self.scheduler.overlapped_steps
        if not overlapped:
            self._process_outputs()
        masks = self._token_masks(self.scheduler.decoding)
        batch = self.scheduler.decode_batch()
        if batch is None:
            self._process_outputs()
            return
        output = self._run_guarded(batch.requests, partial(self.runner.decode, batch, masks))
        if output is not None:
            self._step_outputs.append(output)
            self.metrics.totals["steps"] += 1
            self.metrics.totals["step_requests"] += len(batch.requests)
            for request in batch.requests:
                request.num_computed_tokens += 1
                usage = request.usage
                usage.batch_size = max(usage.batch_size, len(batch.requests))
        self._process_outputs(keep=overlapped)

    def _token_masks(self, requests: Sequence[EngineRequest]) -> dict[int, torch.Tensor]:
        """The tokens that grammars allow next, bool [vocab] by slot."""
        masks = {}
        for request in requests:
            if request.grammar is not None:
                remaining = request.max_tokens - len(request.output_token_ids)
                mask = self._run_guarded([request], partial(request.grammar.mask, remaining))
                if mask is not None:
                    masks[request.slots[0]] = mask
        return masks

    def _process_outputs(self, keep: int = 0) -> None:
        """Process the output of all steps but the newest `keep`, which may still be running."""
        while len(self._step_outputs) > keep:
            output = self._step_outputs.popleft()
            requests = [request for request, _ in output.requests]
            token_ids = self._run_guarded(requests, output.tokens)
            for request, row in output.requests:
                if request not in self.output.unfinished:
                    continue
                if request.beam_search is not None:
                    self._run_guarded([request], partial(self._continue_beams, request, output))
                elif token_ids is not None:
                    append = partial(self.output.append_token, request, token_ids[row])
                    self._run_guarded([request], append)

    def _continue_beams(self, request: EngineRequest, output: StepOutput) -> None:
        self._advance_beams(request, self.runner.score_beams(request, output.logits))

    def _advance_beams(self, request: EngineRequest, log_probs: torch.Tensor) -> None:
        """Advance a request's search by one step and prepare its slots for the next."""
        search = request.beam_search
        assert search is not None
        parents, token_ids = search.advance(log_probs)
        if search.finished:
            self.output.finish_beams(request, search.best())
        else:
            self.runner.reorder_beams(request, parents, token_ids)

    def _run_guarded(self, requests: Sequence[EngineRequest], work: Callable[[], T]) -> T | None:
        """Run `work` for these requests. If it raises, they fail and the engine continues."""
        try:
            return self.runner.retry_out_of_memory(work)
        except Exception as error:
            logger.exception("%d requests failed", len(requests))
            self.output.fail(requests, error)
            return None
