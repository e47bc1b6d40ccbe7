"""Decides what the engine computes next. Plain data in, plain data out: no torch, model or threads.

Each step has one budget of tokens. Every decoding request gets its next token; the rest of the
budget goes to requests whose prompt is not computed yet, in order of arrival: to their images, and
to the next chunk of their prompt. So the time between two tokens of a stream has a bound that does
not depend on how much is waiting.

A request is admitted when the budget lasts and batch rows and blocks for its whole prompt are free;
it takes further blocks as its answer grows. When there are none left, the newest request is
preempted: it gives up its blocks, waits, and is computed again, mostly from blocks that can still
be found.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xgenmm.config import BLOCK_SIZE
from xgenmm.engine.block_manager import BlockManager
from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.request import EngineRequest
from xgenmm.preprocessing.tiling import TiledImage

TOKENS_PER_TILE = 85
"""What encoding a tile costs in prompt tokens, for the released models."""


@dataclass(frozen=True)
class SchedulerConfig:
    """The budget of a step, and the intervals of the engine's loop.

    max_num_batched_tokens: the budget of a step, in tokens. Small ones keep streams even, large
        ones raise throughput.
    max_idle_batched_tokens: the same while no request is decoding, so nobody waits for the step.
    overlapped_steps: steps that begin before the tokens of earlier ones reach the host.
    stall_seconds: a busy engine without a step for this long counts as stuck.
    summary_seconds: interval of activity between two summaries in the log.
    """

    max_num_batched_tokens: int = 512
    max_idle_batched_tokens: int = 512
    overlapped_steps: int = 0
    stall_seconds: float = 300.0
    summary_seconds: float = 60.0

    @classmethod
    def for_device(cls, device_type: str, max_num_batched_tokens: int = 512) -> "SchedulerConfig":
        """The defaults for `cpu` or `cuda`.

        A CPU gains nothing from overlapped steps or from larger batches.
        """
        if device_type == "cuda":
            idle = max(2048, max_num_batched_tokens)
            return cls(max_num_batched_tokens, idle, overlapped_steps=1)
        return cls(max_num_batched_tokens, max_num_batched_tokens)


@dataclass(frozen=True)
class PrefillChunk:
    """The tokens `start` to `start + length` of what a request has to prefill."""

    request: EngineRequest
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        """Whether the next token follows."""
        return self.start + self.length == self.request.num_prefill_tokens


@dataclass(frozen=True)
class ChoicesChunk:
    """Choices `start` to `stop` of a request, computed side by side as continuations of its prompt.

    Their keys and values lie in the request's scratch blocks. The last token of a choice is only
    scored, so it is not computed.
    """

    request: EngineRequest
    start: int
    stop: int

    @property
    def token_ids(self) -> list[Sequence[int]]:
        """The tokens to compute of each choice that has more than one."""
        choices = self.request.choices[self.start : self.stop]
        return [choice[:-1] for choice in choices if len(choice) > 1]


@dataclass
class Step:
    """What to do in one step, in this order.

    freed_rows: rows of preempted requests. admitted: requests with new rows.
    block_copies: (source, target), before anything is computed.
    images: to encode, by hash, each once. image_users: the requests that need each of them, and
        its index among their images.
    decoding, chunks, choices: what the forward pass computes.
    """

    freed_rows: list[int] = field(default_factory=list)
    admitted: list[EngineRequest] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    images: dict[bytes, TiledImage] = field(default_factory=dict)
    image_users: dict[bytes, list[tuple[EngineRequest, int]]] = field(default_factory=dict)
    decoding: list[EngineRequest] = field(default_factory=list)
    chunks: list[PrefillChunk] = field(default_factory=list)
    choices: list[ChoicesChunk] = field(default_factory=list)

    @property
    def num_tiles(self) -> int:
        """Tiles of all images to encode."""
        return sum(image.pixels.shape[0] for image in self.images.values())

    @property
    def requests(self) -> list[EngineRequest]:
        """The requests of the forward pass."""
        parts: list[PrefillChunk | ChoicesChunk] = [*self.chunks, *self.choices]
        return [*self.decoding, *(part.request for part in parts)]

    def drop(self, request: EngineRequest) -> None:
        """Take a request that has ended or was preempted out of the step."""
        self.admitted = [one for one in self.admitted if one is not request]
        self.decoding = [one for one in self.decoding if one is not request]
        self.chunks = [chunk for chunk in self.chunks if chunk.request is not request]
        self.choices = [chunk for chunk in self.choices if chunk.request is not request]


class Scheduler:
    """The waiting and running requests of an engine, both in order of arrival.

    Args:
        max_num_seqs: rows of the batch.
        blocks: of the KV cache.
        image_features: features of images that were encoded before, and vision tokens of clips, by
            hash.
        config: the budgets.
    """

    def __init__(
        self,
        max_num_seqs: int,
        blocks: BlockManager,
        image_features: LRUCache[Any],
        config: SchedulerConfig,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting: deque[EngineRequest] = deque()
        self.running: list[EngineRequest] = []
        self.free_rows = set(range(max_num_seqs))
        self.num_preemptions = 0
        self._image_features = image_features

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    @property
    def overlapped_steps(self) -> int:
        """Steps that may begin before the host has seen the tokens of earlier ones.

        0 if a request has a grammar or beams: both need a token to prepare the next step.
        """
        for request in self.running:
            if request.decoding and (request.grammar is not None or request.num_seqs > 1):
                return 0
        return self.config.overlapped_steps

    def add(self, request: EngineRequest) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def remove(self, request: EngineRequest) -> None:
        """Forget a waiting or running request; its blocks can still be found."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def expired(self, now: float) -> list[EngineRequest]:
        """The requests whose deadline has passed at `time.monotonic` seconds `now`."""
        return [request for request in [*self.running, *self.waiting] if now > request.deadline]

    def cancelled(self) -> list[EngineRequest]:
        """The requests that their callers have cancelled."""
        return [request for request in [*self.running, *self.waiting] if request.sink.cancelled]

    def schedule(self) -> Step:
        """Plan the next step and take the blocks for it. `update` has to follow it."""
        step = Step()
        for request in [request for request in self.running if request.decoding]:
            if request.grammar is not None and not request.grammar.ready:
                continue  # its mask takes longer than others should wait for
            if request.rows and self._reserve_next(request, step):
                step.decoding.append(request)
        config = self.config
        budget = config.max_num_batched_tokens if step.decoding else config.max_idle_batched_tokens
        budget -= sum(request.num_seqs for request in step.decoding)
        for request in [request for request in self.running if not request.decoding]:
            if request.rows:
                budget -= self._schedule_prefill(request, budget, step)
        # One by one, so that a request finds what the ones before it have computed.
        while budget > 0 and not step.freed_rows and (admitted := self._admit(step)) is not None:
            budget -= self._schedule_prefill(admitted, budget, step)
        return step

    def update(self, step: Step) -> None:
        """Count what a step has computed, and let full blocks be found."""
        for request in step.decoding:
            request.num_computed_tokens += 1
        for chunk in step.chunks:
            chunk.request.num_computed_tokens += chunk.length
            self._register(chunk.request)
        for choices in step.choices:
            choices.request.next_choice = choices.stop
            self.blocks.release(choices.request.scratch_blocks)
            choices.request.scratch_blocks = []

    def fork(self, request: EngineRequest, parents: Sequence[int]) -> None:
        """Let beam i of a request continue its beam `parents[i]`; they share all blocks."""
        tables = [list(request.block_tables[parent]) for parent in parents]
        for table in tables:
            self.blocks.share(table)
        for table in request.block_tables:
            self.blocks.release(table)
        request.block_tables = tables

    def _reserve_next(self, request: EngineRequest, step: Step) -> bool:
        """Take the blocks for a decoding request's next token; False if it computes none."""
        position = request.num_computed_tokens
        if position + 1 >= request.num_prompt_tokens + request.max_tokens:
            return False  # its last token is on its way to the host
        index, copies = position // BLOCK_SIZE, []
        for table in request.block_tables:
            if index < len(table) and not self.blocks.is_shared(table[index]):
                continue
            new = self._take(request, 1, step)
            if not new:
                return False
            if index < len(table):  # shared with another beam
                copies.append((table[index], new[0]))
                self.blocks.release(table[index:])
            table[index:] = new
        step.block_copies += copies
        return True

    def _take(self, request: EngineRequest, count: int, step: Step) -> list[int]:
        """Take blocks, if need be those of newer requests; none if the request is the newest."""
        while self.blocks.num_free < count:
            newest = self.running[-1]
            self._preempt(newest, step)
            if newest is request:
                return []
        return [self.blocks.allocate() for _ in range(count)]

    def _preempt(self, request: EngineRequest, step: Step) -> None:
        self.num_preemptions += 1
        step.drop(request)
        step.freed_rows += request.rows
        self.running.remove(request)
        self.waiting.appendleft(request)
        self._release(request)
        request.preempt()

    def _admit(self, step: Step) -> EngineRequest | None:
        """Admit the first waiting request if rows and blocks for it are free."""
        if not self.waiting or len(self.free_rows) < self.waiting[0].num_seqs:
            return None
        request = self.waiting[0]
        total = request.num_known_tokens
        # At least one token must be computed, for the logits that follow it.
        cached = self.blocks.find(request.block_hashes[: (total - 1) // BLOCK_SIZE])
        missing = -(-total // BLOCK_SIZE) - len(cached)
        if self.blocks.num_free - self.blocks.num_unowned(cached) < missing:
            return None
        self.waiting.popleft()
        self.blocks.share(cached)
        request.block_tables = [[*cached, *(self.blocks.allocate() for _ in range(missing))]]
        request.num_cached_tokens = request.num_computed_tokens = len(cached) * BLOCK_SIZE
        # The lowest rows, because a decode step may run over all rows up to the last in use.
        request.rows = sorted(self.free_rows)[: request.num_seqs]
        self.free_rows.difference_update(request.rows)
        self.running.append(request)
        step.admitted.append(request)
        if request.hashes.clip is not None and request.pending_images:
            request.clip_tokens = self._image_features.get(request.hashes.clip)
        for index in request.pending_images:
            features = self._image_features.get(request.hashes.images[index])
            if features is not None:
                request.image_features[index] = features
        return request

    def _schedule_prefill(self, request: EngineRequest, budget: int, step: Step) -> int:
        """Add the request's images, and then its next tokens, to the step; returns their cost."""
        cost = self._schedule_images(request, budget, step)
        return cost + self._schedule_tokens(request, budget - cost, step)

    def _schedule_images(self, request: EngineRequest, budget: int, step: Step) -> int:
        """Add the request's images to the step while the budget lasts; returns their cost.

        An image that exceeds any budget is encoded in a step without other images and prompts.
        """
        cost = 0
        if budget <= 0:
            return 0
        for index in request.pending_images:
            image_hash, image = request.hashes.images[index], request.images[index]
            if image_hash not in step.images:
                tokens = image.pixels.shape[0] * TOKENS_PER_TILE
                if cost + tokens > budget and (step.images or step.chunks):
                    return budget
                cost += tokens
                step.images[image_hash] = image
            step.image_users.setdefault(image_hash, []).append((request, index))
        return cost

    def _schedule_tokens(self, request: EngineRequest, budget: int, step: Step) -> int:
        """Add the request's next prompt chunk or choices to the step; returns their tokens."""
        if budget <= 0:
            return 0
        if request.prefilled:
            return self._schedule_choices(request, budget, step)
        start = request.num_computed_tokens
        length = min(budget, request.num_prefill_tokens - start)
        step.chunks.append(PrefillChunk(request, start, length))
        return length

    def _schedule_choices(self, request: EngineRequest, budget: int, step: Step) -> int:
        """As many choices as fit the budget and the free blocks, and always at least one."""
        budget = min(budget, self.blocks.num_free * BLOCK_SIZE)
        start = stop = request.next_choice
        if start == len(request.choices):
            return 0  # the last ones are on their way to the host
        tokens = 0
        for choice in request.choices[start:]:
            if stop > start and tokens + len(choice) - 1 > budget:
                break
            stop, tokens = stop + 1, tokens + len(choice) - 1
        if tokens:
            request.scratch_blocks = self._take(request, -(-tokens // BLOCK_SIZE), step)
            if not request.scratch_blocks:
                return 0
        step.choices.append(ChoicesChunk(request, start, stop))
        return tokens

    def _register(self, request: EngineRequest) -> None:
        """Let the full blocks of a request be found by later ones."""
        full = request.block_hashes[: request.num_computed_tokens // BLOCK_SIZE]
        for block, block_hash in zip(request.block_tables[0], full, strict=False):
            self.blocks.register(block, block_hash)

    def _release(self, request: EngineRequest) -> None:
        """Give back the rows and blocks of a running request, which can still be found."""
        if request.output_token_ids:
            request.block_hashes = request.hashes.blocks_with_output(request.output_token_ids)
        self._register(request)
        for table in request.block_tables:
            self.blocks.release(table)
        self.blocks.release(request.scratch_blocks)
        self.free_rows.update(request.rows)
        request.rows, request.block_tables, request.scratch_blocks = [], [], []
