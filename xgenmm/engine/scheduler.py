"""Continuous batching: many requests decode together over one static key/value cache.

Prompts and images in, token ids out; knows nothing of text, Cog or HTTP. One thread does all work
of a scheduler. Between two decode steps, which serve all running streams at once, it takes in new
jobs and does one piece of other work, or several: a batch of tiles through the encoder, or at most
a chunk of positions of waiting prompts. So no stream ever waits for more than that.

A job owns one row of the cache, a slot (`num_beams` of them if it searches), from its admission to
its end. A row's next token goes to `BatchState.position`, also in rows that are still being
prefilled or idle: a decode step runs over all rows up to the last busy one, and what it writes for
the others lands where it is overwritten before it is ever seen. Shapes are static but for the
number of rows, a power of two, and of keys.

On a GPU a step begins before the host has seen the tokens of the one before it, so the device never
waits for the host; a row that has ended then makes one token more, which nobody gets.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Literal, Protocol, TypeVar, get_args

import torch

from xgenmm.engine.batch_state import BatchState
from xgenmm.engine.prefix_cache import BLOCK, Caches, PromptHashes
from xgenmm.engine.sampler import BeamSearch
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.engine.structured_output import Grammar
from xgenmm.errors import EngineError, InputError
from xgenmm.kernels.cuda_graphs import build_decode_step
from xgenmm.models.xgenmm import XGenMM, padded_length
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import TiledImage

logger = logging.getLogger(__name__)

CHUNK = 512
"""Prompt positions, padding included, that are prefilled in one piece."""

TILES = 6
"""Tiles whose encoding is for the released models about the work of `CHUNK` positions."""

TILES_ALONE = 32
"""Tiles that a GPU encodes at once while nobody is being answered; a CPU gains nothing by more."""

STUCK = 300.0
"""Seconds without a step after which a busy engine counts as stuck."""

SMALL = 64 << 20
"""Bytes of weights up to which a decode step is quicker with one thread of a CPU than with several,
which meet after every product."""

SUMMARY = 60.0
"""Seconds of activity between two summaries in the log."""

StopReason = Literal["end", "stop", "length", "cancelled", "timeout", "failed"]
T = TypeVar("T")


@dataclass
class Usage:
    """What an answer cost. Times are seconds.

    prompt_tokens: positions of the prompt; `image_tokens` of them are vision tokens, and for
        `cached_tokens` the keys and values of an earlier prompt were reused.
    queue_time: until a slot was free. prefill_time: from then to the first token, encoding of the
        images included. time_to_first_token: of the whole request, reading of tiles included.
    tokens_per_second: output tokens over the whole time.
    batch_size: the most requests that shared a decode step with this one, itself included.
    stop_reason: `end` (the model's own end), `stop` (a stop sequence), `length` (max_new_tokens
        or the context), `cancelled`, `timeout`, `failed`.
    choices: the probability of each choice, where there were any.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_time: float = 0.0
    prefill_time: float = 0.0
    time_to_first_token: float = 0.0
    tokens_per_second: float = 0.0
    batch_size: int = 0
    stop_reason: StopReason = "cancelled"
    choices: dict[str, float] | None = None


class OutputSink(Protocol):
    """Who asked. All but `cancelled` is called by the scheduler's thread and must not block."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the rest any more."""

    def token(self, token: int) -> StopReason | None:
        """Take the next token; says why the answer is complete with it, if it is."""

    def chosen(self, number: int, probabilities: Sequence[float]) -> None:
        """Take the likeliest of the job's choices, and the probability of each."""

    def end(self, reason: StopReason, error: Exception | None) -> None:
        """Nothing more will come."""


@dataclass(eq=False)
class EngineRequest:
    """One request, and how far it has come.

    prompt and images belong together and `keys` are theirs; with `limit` tokens more they fit
    the context. choices: token ids of each, its end included, to choose from instead of free text.
    started, deadline: by `time.monotonic`.
    """

    prompt: Prompt
    images: Sequence[TiledImage]
    keys: PromptHashes
    params: SamplingParams
    limit: int
    receiver: OutputSink
    usage: Usage = field(default_factory=Usage)
    constraint: Grammar | None = None
    choices: Sequence[Sequence[int]] = ()
    started: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")

    # The scheduler's own:
    rows: list[int] = field(default_factory=list, init=False)
    encoded: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    embeds: torch.Tensor | None = field(default=None, init=False)
    length: int = field(default=0, init=False)  # positions whose keys and values are in the cache
    made: list[int] = field(default_factory=list, init=False)
    search: BeamSearch | None = field(default=None, init=False)
    admitted: float = field(default=0.0, init=False)

    @property
    def total(self) -> int:
        """Positions of the prompt."""
        return len(self.keys.words)

    @property
    def slots(self) -> int:
        """How many slots the job takes: one for each beam."""
        return 1 if self.choices else self.params.num_beams

    @property
    def missing(self) -> list[int]:
        """Numbers of the images that still have to be encoded."""
        if self.embeds is not None or self.decoding:
            return []
        ends, cached = self.keys.ends, self.usage.cached_tokens
        return [i for i, end in enumerate(ends) if end > cached and i not in self.encoded]

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.length >= self.total


@dataclass(frozen=True)
class StepOutput:
    """What one step makes, begun but perhaps not done.

    jobs: each with its token's place among `tokens`, which waits for them. logits: of all rows.
    """

    jobs: Sequence[tuple[EngineRequest, int]]
    tokens: Callable[[], list[int]]
    logits: torch.Tensor


def is_small(model: XGenMM) -> bool:
    """Whether the model's operations are too short to be shared by several cores of a CPU."""
    return sum(parameter.nbytes for parameter in model.parameters()) <= SMALL


class Scheduler:
    """The thread that answers requests, and the slots it answers them in.

    Args:
        model: may serve further schedulers.
        end_ids: the tokens that end a beam.
        slots: rows of the key/value cache.
        caches: what is kept between requests; may serve further schedulers.
        pieces: of other work that are done between two decode steps.
        threads: how many of PyTorch's threads the next piece of work may take.
        name: of the thread, for the log.
    """

    def __init__(
        self,
        model: XGenMM,
        end_ids: Collection[int],
        slots: int,
        caches: Caches,
        pieces: int,
        threads: Callable[[], int],
        name: str,
    ) -> None:
        self.model = model
        self.slots = slots
        self.caches = caches
        self._pieces = pieces
        self._threads = threads
        self._end_ids = frozenset(end_ids)
        decoder = model.config.decoder
        # One index more than the context: where padding goes that would pass the end.
        self._cache = model.cache(slots, decoder.max_positions + 1)
        self._step = build_decode_step(model, self._cache)
        self.ahead = int(model.device.type == "cuda")  # steps begun before tokens are looked at
        self._made: deque[StepOutput] = deque()
        vocab = decoder.initial_vocab + decoder.additional_tokens
        self._slots = BatchState(slots, vocab, model.device)
        self._free = list(range(slots))
        self._inbox: SimpleQueue[EngineRequest | None] = SimpleQueue()
        self._waiting: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lock = threading.Lock()
        self._jobs: set[EngineRequest] = set()  # accepted and not ended
        self._closed = False
        self._abandoned = False
        self._failure: BaseException | None = None
        self._beat = time.monotonic()
        self._since = time.monotonic()
        self._counts: Counter[str] = Counter()

    # From any thread

    def submit(self, job: EngineRequest) -> None:
        """Queue a job. Raises EngineError when the engine is shut down or broken."""
        with self._lock:
            self.check()
            if self._closed:
                raise EngineError("the engine is shut down; start it again")
            if self._thread.ident is None:
                self._thread.start()
            if not self._jobs:
                self._beat = time.monotonic()
            self._jobs.add(job)
            self._inbox.put(job)

    def check(self) -> None:
        """Raise EngineError if the thread has died, or makes no step though it has work."""
        if self._failure is not None:
            raise EngineError(f"the engine stopped: {self._failure!r}; restart it")
        silent = time.monotonic() - self._beat
        if silent > STUCK and self._jobs:
            raise EngineError(f"the engine has made no step for {silent:.0f} s; restart it")

    def close(self, *, finish: bool = True) -> None:
        """Refuse new jobs; the thread stops when the accepted ones have ended.

        finish: otherwise they are cancelled.
        """
        with self._lock:
            self._closed = True
            self._abandoned |= not finish
            self._inbox.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait, at most `timeout` seconds, until the thread has stopped."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    @property
    def busy(self) -> int:
        """How many jobs have not ended yet."""
        return len(self._jobs)

    # The thread

    @torch.inference_mode()
    def _run(self) -> None:
        small = is_small(self.model)
        try:
            while self._receive():
                threads = self._threads()
                torch.set_num_threads(threads)
                self._drop()
                self._admit()
                for _ in range(self._pieces):
                    self._work()
                torch.set_num_threads(1 if small else threads)
                self._decode()
                self._summarise()
        except BaseException as error:
            logger.exception("the engine stops")
            with self._lock:
                self._failure = error
            for job in self._jobs:
                job.receiver.end("failed", EngineError(f"the engine stopped: {error!r}"))

    def _receive(self) -> bool:
        """Take what has come in; wait for it if there is nothing else to do. False at the end."""
        while True:
            idle = not self._running and not self._waiting
            if idle and self._closed and self._inbox.empty():
                return False
            try:
                job = self._inbox.get(block=idle)
            except Empty:
                return True
            self._beat = time.monotonic()
            if job is not None:
                if idle:
                    self._since = max(self._since, time.monotonic() - SUMMARY)
                self._waiting.append(job)

    def _drop(self) -> None:
        """End the jobs that nobody waits for any more, or not any longer."""
        self._beat = now = time.monotonic()
        for job in [*self._running, *self._waiting]:
            if job.receiver.cancelled or self._abandoned:
                self._end(job, "cancelled")
            elif now > job.deadline:
                self._end(job, "timeout")

    def _admit(self) -> None:
        """Give waiting jobs their slots, first come first served, the lowest rows first."""
        while self._waiting and len(self._free) >= self._waiting[0].slots:
            job = self._waiting.popleft()
            self._running.append(job)
            self._free.sort()
            job.rows, self._free = self._free[: job.slots], self._free[job.slots :]
            self._try([job], partial(self._begin, job))

    def _begin(self, job: EngineRequest) -> None:
        job.admitted = time.monotonic()
        job.usage.queue_time = job.admitted - job.started
        # At least one position is left to compute: the logits after it are wanted.
        known = job.keys.blocks[: (job.total - 1) // BLOCK]
        job.length = job.usage.cached_tokens = self.caches.prefixes.restore(
            known, self._cache, job.rows[0]
        )
        for row in job.rows:
            self._slots.join(row, job.params, job.length)
        if job.slots > 1:
            job.search = BeamSearch(job.slots, self._end_ids, job.limit)
        for number in job.missing:
            held = self.caches.images.get(job.keys.images[number])
            if held is not None:
                job.encoded[number] = held
        self._counts["prompt positions"] += job.total
        self._counts["cached positions"] += job.length

    def _work(self) -> None:
        """Do one piece of what the longest waiting job needs before it decodes."""
        oldest = next((job for job in self._running if not job.decoding), None)
        if oldest is not None and oldest.missing:
            self._encode()
        elif oldest is not None:
            self._prefill()

    def _encode(self) -> None:
        """Encode the images that are waited for longest, of several jobs at once."""
        room = TILES
        if self.model.device.type == "cuda" and not any(job.decoding for job in self._running):
            room = TILES_ALONE
        waited: dict[bytes, list[tuple[EngineRequest, int]]] = {}
        chosen: dict[bytes, TiledImage] = {}
        for job in self._running:
            for number in job.missing:
                key, image = job.keys.images[number], job.images[number]
                if key not in chosen:
                    if chosen and image.pixels.shape[0] > room:
                        continue
                    room -= image.pixels.shape[0]
                    chosen[key] = image
                waited.setdefault(key, []).append((job, number))

        def work() -> list[torch.Tensor]:
            images = list(chosen.values())
            features = self.model.features(images)
            if self.model.config.resampler.text_tokens:
                return features
            return self.model.vision_tokens(images, features)

        jobs = {job for places in waited.values() for job, _ in places}
        encoded = self._try(list(jobs), work)
        if encoded is None:
            return
        for key, tensor in zip(chosen, encoded, strict=True):
            kept = tensor.clone()  # of its own, not a view of the whole batch
            self.caches.images.put(key, kept)
            for job, number in waited[key]:
                job.encoded[number] = kept
        self._counts["tiles"] += sum(image.pixels.shape[0] for image in chosen.values())

    def _prefill(self) -> None:
        """Take the next positions of waiting prompts, as many as make up a chunk."""
        batch: list[tuple[EngineRequest, torch.Tensor]] = []
        longest = 0
        for job in list(self._running):
            if job.decoding or job.missing:
                continue
            if job.embeds is None:
                self._try([job], partial(self._fuse, job))
            if job.embeds is None:
                continue
            part = job.embeds[job.length : job.length + CHUNK]
            longest = max(longest, padded_length(len(part)))
            if batch and (len(batch) + 1) * longest > CHUNK:
                break
            batch.append((job, part))
        if not batch:
            return
        jobs, parts = zip(*batch, strict=True)

        def work() -> torch.Tensor:
            starts, rows = [job.length for job in jobs], [job.rows[0] for job in jobs]
            return self.model.prefill_chunk(parts, starts, rows, self._cache)

        logits = self._try(jobs, work)
        if logits is None:
            return
        for (job, part), row_logits in zip(batch, logits, strict=True):
            job.length += len(part)
            self._slots.position[job.rows[0]] = job.length
            if job.decoding:
                self._try([job], partial(self._begin_answer, job, row_logits[None]))

    def _fuse(self, job: EngineRequest) -> None:
        config, device = self.model.config, self.model.device
        vision = []
        for number, image in enumerate(job.images):
            if number not in job.encoded:  # its keys and values are cached: nobody looks here
                count = image.pixels.shape[0] * config.resampler.num_latents
                vision.append(torch.zeros(count, config.decoder.hidden_size, device=device))
            elif config.resampler.text_tokens:
                features = [job.encoded[number]]
                vision += self.model.vision_tokens([image], features, job.prompt)
            else:
                vision.append(job.encoded[number])
        job.embeds = self.model.merge_multimodal_embeddings(job.prompt, vision)
        job.encoded.clear()

    def _begin_answer(self, job: EngineRequest, logits: torch.Tensor) -> None:
        """From the prompt's last logits [1, vocab]: choose, begin a search, or draw a token."""
        job.embeds = None
        now = time.monotonic()
        job.usage.prefill_time = now - job.admitted
        self._remember(job)
        if job.choices:
            self._choose(job, logits)
        elif job.search:
            job.usage.time_to_first_token = now - job.started
            rows = torch.tensor(job.rows, device=self.model.device)
            self._cache.reorder(rows[:1].expand(len(rows)), job.length, into=rows)
            self._advance(job, self._slots.penalised(rows[:1], logits.log_softmax(-1)))
        else:
            row = job.rows[0]
            self._slots.start(row)
            rows = torch.tensor([row], device=self.model.device)
            for mask in self._allowed([job]).values():
                logits = _masked(logits, {0: mask})
            if job in self._running:
                tokens = self._slots.draw(rows, logits)
                self._made.append(StepOutput([(job, 0)], _fetch(tokens), logits))

    def _choose(self, job: EngineRequest, logits: torch.Tensor) -> None:
        """Score the choices against each other; all of them share the prompt's prefill."""
        first = logits[0].log_softmax(-1)
        scores = [first[choice[0]] for choice in job.choices]
        room = min(CHUNK, self.model.config.decoder.max_positions - job.length)
        pending = deque(enumerate(job.choices))
        while pending:
            group: list[tuple[int, Sequence[int]]] = []
            used = 0
            while pending and (not group or used + len(pending[0][1]) <= room):
                group.append(pending.popleft())
                used += len(group[-1][1])
            group = [(number, choice) for number, choice in group if len(choice) > 1]
            if not group:
                continue
            texts = [choice[:-1] for _, choice in group]
            along = self.model.score_continuations(texts, job.length, job.rows[0], self._cache)
            for (number, choice), rows in zip(group, along, strict=True):
                rest = torch.tensor(choice[1:], device=rows.device)
                scores[number] = (
                    scores[number] + rows.log_softmax(-1).gather(1, rest[:, None]).sum()
                )
        total = torch.stack(scores)
        best = int(total.argmax())
        job.usage.output_tokens = len(job.choices[best])
        job.usage.time_to_first_token = time.monotonic() - job.started
        job.receiver.chosen(best, total.softmax(0).tolist())
        self._end(job, "end")

    def _decode(self) -> None:
        """Begin a step of all jobs that decode; hand out what earlier ones made."""
        # A grammar and a search must see a token before the next step can begin.
        deciding = [job for job in self._running if job.decoding and (job.constraint or job.search)]
        ahead = 0 if deciding else self.ahead
        if not ahead:
            self._hand_out(0)
        masks = self._allowed([job for job in self._running if job.decoding])
        jobs = [job for job in self._running if job.decoding]
        if jobs:
            self._begin_step(jobs, masks)
        self._hand_out(ahead if jobs else 0)

    def _begin_step(self, jobs: Sequence[EngineRequest], masks: Mapping[int, torch.Tensor]) -> None:
        last = max(row for job in jobs for row in job.rows)
        count = min(self.slots, 1 << last.bit_length())
        rows = slice(count)
        # Rows that are being prefilled write at their own position too, so it counts as well.
        length = 1 + max(job.length for job in self._running)

        def work() -> tuple[torch.Tensor, torch.Tensor]:
            slots = self._slots
            logits = self._step(slots.token[rows], slots.position[rows], self._cache, length)
            tokens = slots.draw(rows, _masked(logits, masks))
            slots.advance(rows)  # last, so that this can be tried again until then
            return logits, tokens

        made = self._try(jobs, work)
        if made is None:
            return
        logits, tokens = made
        self._made.append(StepOutput([(job, job.rows[0]) for job in jobs], _fetch(tokens), logits))
        self._counts["steps"] += 1
        self._counts["step requests"] += len(jobs)
        for job in jobs:
            job.length += 1
            job.usage.batch_size = max(job.usage.batch_size, len(jobs))

    def _hand_out(self, left: int) -> None:
        """Hand out what was made, but for the `left` newest steps, which may still be in work."""
        while len(self._made) > left:
            made = self._made.popleft()
            tokens = self._try([job for job, _ in made.jobs], made.tokens)
            for job, place in made.jobs:
                if job not in self._jobs:  # it ended while this was made
                    continue
                if job.search is None:
                    assert tokens is not None
                    self._try([job], partial(self._hand_to, job, tokens[place]))
                else:
                    self._try([job], partial(self._continue_search, job, made.logits))

    def _continue_search(self, job: EngineRequest, logits: torch.Tensor) -> None:
        rows = torch.tensor(job.rows, device=self.model.device)
        self._advance(job, self._slots.penalised(rows, logits[rows].log_softmax(-1)))

    def _advance(self, job: EngineRequest, scores: torch.Tensor) -> None:
        """One step of a beam search: scores are penalised log-probabilities of its rows."""
        assert job.search is not None
        parents, tokens = job.search.advance(scores)
        if job.search.finished:
            reason: StopReason | None = None
            for token in job.search.best():
                job.usage.output_tokens += 1
                reason = job.receiver.token(token)
                if reason is not None:
                    break
            self._end(job, reason or "length")
            return
        device = self.model.device
        rows = torch.tensor(job.rows, device=device)
        sources = rows[torch.tensor(parents, device=device)]
        self._cache.reorder(sources, job.length, into=rows)
        self._slots.follow(rows, sources, torch.tensor(tokens, device=device))
        self._slots.position[rows] = job.length

    def _hand_to(self, job: EngineRequest, token: int) -> None:
        usage = job.usage
        if not job.made:
            usage.time_to_first_token = time.monotonic() - job.started
        job.made.append(token)
        usage.output_tokens += 1
        if job.constraint is not None:
            job.constraint.advance(token)
        reason = job.receiver.token(token)
        if reason is None and job.constraint is not None and job.constraint.finished:
            reason = "end"
        if reason is None and len(job.made) == job.limit:
            reason = "length"
        if reason is not None:
            self._end(job, reason)

    def _allowed(self, jobs: Sequence[EngineRequest]) -> dict[int, torch.Tensor]:
        """The tokens that constraints allow next, by row; one that fails, fails its job."""
        masks = {}
        for job in jobs:
            if job.constraint is not None:
                left = job.limit - len(job.made)
                mask = self._try([job], partial(job.constraint.mask, left))
                if mask is not None:
                    masks[job.rows[0]] = mask
        return masks

    def _remember(self, job: EngineRequest) -> None:
        """Keep the keys and values of the prompt, and of the answer once there is one."""
        keys = job.keys.continued(job.made)[: job.length // BLOCK]
        self.caches.prefixes.save(keys, self._cache, job.rows[0])

    def _end(self, job: EngineRequest, reason: StopReason, error: Exception | None = None) -> None:
        """Free all that the job holds and tell who asked, once."""
        if job not in self._jobs:
            return
        self._jobs.remove(job)
        if job in self._waiting:
            self._waiting.remove(job)
        else:
            self._running.remove(job)
            if error is None and job.decoding and job.made:
                self._remember(job)
            for row in job.rows:
                self._slots.leave(row)
            self._free += job.rows
        usage = job.usage
        usage.stop_reason = reason
        usage.tokens_per_second = usage.output_tokens / (time.monotonic() - job.started)
        self._counts[reason] += 1
        self._counts["tokens"] += usage.output_tokens
        try:
            job.receiver.end(reason, error)
        except Exception:
            logger.exception("a request's receiver fails at its end")

    def _try(self, jobs: Sequence[EngineRequest], work: Callable[[], T]) -> T | None:
        """Do work for these jobs. If it fails they fail, and nobody else.

        When memory runs out what is kept between requests is dropped, and the work tried once more.
        """
        try:
            try:
                return work()
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                logger.warning("out of memory: dropping the caches and trying once more")
            self.caches.clear()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            return work()
        except Exception as error:
            logger.exception("%d requests fail", len(jobs))
            known = isinstance(error, InputError)
            cause = error if known else EngineError(f"the request failed in the model: {error!r}")
            for job in jobs:
                self._end(job, "failed", cause)
            return None

    def _summarise(self) -> None:
        """Say once in a while what was done, while there is something to say."""
        seconds = time.monotonic() - self._since
        if seconds < SUMMARY:
            return
        counts = self._counts
        ended = {reason: counts[reason] for reason in get_args(StopReason) if counts[reason]}
        logger.info(
            "%s, %.0f s: %s; %d running, %d waiting; %.1f tokens/s, %.1f requests a step; "
            "%d tiles encoded, %d of %d prompt positions from the cache",
            self._thread.name,
            seconds,
            ", ".join(f"{count} {reason}" for reason, count in ended.items()) or "none ended",
            len(self._running),
            len(self._waiting),
            counts["tokens"] / seconds,
            counts["step requests"] / max(1, counts["steps"]),
            counts["tiles"],
            counts["cached positions"],
            counts["prompt positions"],
        )
        counts.clear()
        self._since = time.monotonic()


def _out_of_memory(error: Exception) -> bool:
    """PyTorch has a class of its own for the GPU only; the CPU's allocator says it in words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in str(error)


def _fetch(tokens: torch.Tensor) -> Callable[[], list[int]]:
    """Begin to copy int64 [n] to the host; what is returned waits for the copy."""
    copy = tokens.to("cpu", non_blocking=True)  # from a GPU, to memory that is pinned
    if tokens.device.type != "cuda":
        return copy.tolist
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[int]:
        done.synchronize()
        return copy.tolist()

    return wait


def _masked(logits: torch.Tensor, masks: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The logits [rows, vocab] with what a row's mask bool [vocab] does not allow at -inf."""
    if masks:
        logits = logits.clone()
    for row, mask in masks.items():
        logits[row].masked_fill_(~mask.to(logits.device), float("-inf"))
    return logits
