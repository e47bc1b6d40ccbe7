"""One iteration of the engine: the scheduler decides, the runner computes, output is delivered.

On a GPU, a step begins before the host has seen the tokens of the step before, so that the device
never waits for the host. A request that has finished then computes one more token, which is
discarded.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial
from typing import TypeVar

import torch

from xgenmm.engine.beam_search import BeamSearch
from xgenmm.engine.block_manager import BlockManager
from xgenmm.engine.choices import add_choice_scores, finished_scores, first_choice_scores
from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.metrics import Metrics
from xgenmm.engine.model_runner import ModelRunner, StepOutput
from xgenmm.engine.output import OutputProcessor
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.scheduler import ChoicesChunk, Scheduler, SchedulerConfig, Step
from xgenmm.errors import InputError
from xgenmm.kernels.cuda_graphs import DecodeMode
from xgenmm.models.xgenmm import XGenMM

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRAMMAR_SECONDS = 0.001
"""How long a step waits for the masks of its grammars."""

IDLE_SECONDS = 0.05
"""The same if there is nothing else to compute."""


class EngineCore:
    """Answers requests, one `step` at a time. Not thread-safe.

    end_ids: the tokens that end a beam.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, end_ids: Collection[int]) -> None:
        self.config = scheduler.config
        self.scheduler = scheduler
        self.runner = runner
        self.metrics = Metrics(self.config.summary_seconds)
        self.output = OutputProcessor(scheduler, runner, self.metrics)
        self._end_ids = frozenset(end_ids)
        self._step_outputs: deque[StepOutput] = deque()

    @classmethod
    def build(
        cls,
        model: XGenMM,
        end_ids: Collection[int],
        config: SchedulerConfig,
        *,
        max_num_seqs: int,
        num_blocks: int,
        image_bytes: int,
        prefix_caching: bool = True,
        decode: DecodeMode = "auto",
    ) -> "EngineCore":
        """Build the parts of an engine.

        max_num_seqs: rows of the batch. num_blocks: of the KV cache. image_bytes: for features of
        recent images. prefix_caching: whether they and prompt prefixes are reused. decode: see
        `ModelRunner`.
        """
        features = LRUCache[torch.Tensor](image_bytes if prefix_caching else 0)
        blocks = BlockManager(num_blocks, caching=prefix_caching)
        runner = ModelRunner(model, max_num_seqs, num_blocks, features, decode)
        return cls(Scheduler(max_num_seqs, blocks, features, config), runner, end_ids)

    def step(self, *, cancel_all: bool = False) -> None:
        """Do one step, and deliver the output of earlier ones."""
        self._end_requests(cancel_all)
        overlapped = self.scheduler.overlapped_steps
        if not overlapped:
            self._process_outputs()
        self._await_grammars()
        step = self.scheduler.schedule()
        self._prepare(step)
        if step.images:
            self._encode(step)
        self._merge_embeddings(step)
        if step.requests:
            self._run(step)
        self._process_outputs(keep=overlapped if step.requests else 0)
        self.metrics.log_summary(
            len(self.scheduler.running), len(self.scheduler.waiting), self.runner.decode_path.name
        )

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

    def _await_grammars(self) -> None:
        """Wait a moment for the masks of grammars, and finish requests that need no next token.

        Requests whose masks take longer are left out of the next step, unless it has no others.
        """
        requests = [request for request in self.scheduler.running if request.decoding]
        grammars = [request.grammar for request in requests if request.grammar is not None]
        if not grammars:
            return
        computations = [grammar.computation for grammar in grammars]
        wait(computations, GRAMMAR_SECONDS)
        if len(grammars) == len(self.scheduler.running):
            wait(computations, IDLE_SECONDS, FIRST_COMPLETED)
        for request in requests:
            if request.grammar is None or not request.grammar.ready:
                continue
            if request.grammar.finished:
                self.output.finish(request, "end")
            elif len(request.output_token_ids) == request.max_tokens:
                self.output.finish(request, "length")

    def _prepare(self, step: Step) -> None:
        """Set up the rows of the step's requests."""
        self.runner.free_rows(step.freed_rows)
        for request in list(step.admitted):
            if not request.num_preemptions:
                request.admitted = time.monotonic()
                request.usage.queue_time = request.admitted - request.started
                request.usage.cached_tokens = request.num_cached_tokens
                self.metrics.totals["prompt_tokens"] += request.num_prompt_tokens
                self.metrics.totals["cached_tokens"] += request.num_cached_tokens
            self._run_guarded(step, [request], partial(self.runner.add_request, request))

    def _encode(self, step: Step) -> None:
        users = [request for users in step.image_users.values() for request, _ in users]

        def encode() -> None:
            self.runner.encode(step)
            self.metrics.totals["tiles_encoded"] += step.num_tiles

        self._run_guarded(step, users, encode)

    def _merge_embeddings(self, step: Step) -> None:
        for chunk in list(step.chunks):
            if chunk.request.embeds is None:
                merge = partial(self.runner.merge_embeddings, chunk.request)
                self._run_guarded(step, [chunk.request], merge)

    def _run(self, step: Step) -> None:
        """Begin the forward pass, and what follows from it without waiting for tokens."""
        masks = self._token_masks(step)
        output = self._run_guarded(step, step.requests, partial(self.runner.run, step, masks))
        if output is None:
            return
        self.scheduler.update(step)
        self._step_outputs.append(output)
        self.metrics.totals["steps"] += 1
        self.metrics.totals["step_requests"] += len(step.requests)
        for request in step.decoding:
            request.usage.batch_size = max(request.usage.batch_size, len(step.decoding))
        for chunk in step.chunks:
            if chunk.is_last:
                chunk.request.embeds = None
                if not chunk.request.num_preemptions:
                    chunk.request.usage.prefill_time = time.monotonic() - chunk.request.admitted

    def _token_masks(self, step: Step) -> dict[int, torch.Tensor]:
        """The tokens that grammars allow next, bool [vocab] by batch row."""
        masks = {}
        finished = [chunk.request for chunk in step.chunks if chunk.is_last]
        for request in [*step.decoding, *finished]:
            if request.grammar is not None:
                mask = self._run_guarded(step, [request], request.grammar.mask)
                if mask is not None:
                    masks[request.rows[0]] = mask
        return masks

    def _process_outputs(self, keep: int = 0) -> None:
        """Process the output of all steps but the newest `keep`, which may still be running."""
        while len(self._step_outputs) > keep:
            output = self._step_outputs.popleft()
            requests = list(output.preemptions)
            token_ids = self._run_guarded(None, requests, output.tokens)
            for request, rows in output.requests:
                if self._is_current(request, output) and token_ids is not None:
                    work = partial(self._process_request, request, output, token_ids, rows)
                    self._run_guarded(None, [request], work)
            for chunk, logits in output.choices:
                if self._is_current(chunk.request, output):
                    work = partial(self._process_choices, chunk, logits)
                    self._run_guarded(None, [chunk.request], work)

    def _is_current(self, request: EngineRequest, output: StepOutput) -> bool:
        """Whether a request still waits for this output: not if it has ended or was preempted."""
        current = output.preemptions[request] == request.num_preemptions
        return current and request in self.output.unfinished

    def _process_request(
        self,
        request: EngineRequest,
        output: StepOutput,
        token_ids: Sequence[int],
        rows: Sequence[int],
    ) -> None:
        """Process the logits after a request's prompt or newest token."""
        if request.is_sampled:
            self.output.append_token(request, token_ids[rows[0]])
        elif request.choices:
            request.choice_scores = first_choice_scores(request.choices, output.logits[rows[0]])
        else:
            self._advance_beams(request, self.runner.score_beams(request, output.logits, rows))

    def _process_choices(self, chunk: ChoicesChunk, logits: torch.Tensor) -> None:
        request = chunk.request
        add_choice_scores(request.choice_scores, request.choices, chunk.start, chunk.stop, logits)
        if chunk.stop == len(request.choices):
            self.output.finish_choice(request, finished_scores(request.choice_scores))

    def _advance_beams(self, request: EngineRequest, log_probs: torch.Tensor) -> None:
        """Advance a request's search by one step and prepare its rows for the next."""
        search = request.beam_search
        if search is None:
            request.usage.time_to_first_token = time.monotonic() - request.started
            search = BeamSearch(request.num_seqs, self._end_ids, request.max_tokens)
            request.beam_search = search
        parents, token_ids = search.advance(log_probs)
        if search.finished:
            self.output.finish_beams(request, search.best())
        else:
            self.scheduler.fork(request, parents)
            self.runner.reorder_beams(request, parents, token_ids)

    def _run_guarded(
        self, step: Step | None, requests: Sequence[EngineRequest], work: Callable[[], T]
    ) -> T | None:
        """Run `work` for these requests. If it raises, they fail and the engine continues.

        step: the step that they are taken out of.
        """
        try:
            return self.runner.retry_out_of_memory(work)
        except Exception as error:
            if isinstance(error, InputError):  # its caller's, not the engine's
                logger.info("a request failed: %s", error)
            else:
                logger.exception("%d requests failed", len(requests))
            self.output.fail(requests, error)
            for request in requests:
                if step is not None:
                    step.drop(request)
            return None
