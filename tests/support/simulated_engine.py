"""A scheduler driven the way the engine drives it, with a model of integers instead of tensors.

The KV cache holds one integer per position, a hash of the position's content and of the integers of
all positions before it, which are read from the cache. A request that reads a block of another
prefix, or one that was overwritten while it was in use, gets another answer than `expected_answer`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from tests.support.engine_requests import RecordingSink
from xgenmm.config import BLOCK_SIZE
from xgenmm.engine.block_manager import BlockManager
from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.scheduler import Scheduler, SchedulerConfig, Step
from xgenmm.models.kv_cache import NULL_BLOCK

VOCAB = 40
MISSING = -1
"""Content of a vision token whose image was not encoded."""

Answer = list[list[int]]
"""Token ids of the answer or of each beam, or the score of each choice."""


def expected_answer(request: EngineRequest) -> Answer:
    """The answer to a request, computed alone and without blocks."""
    numbers: list[int] = []
    for content in _contents(request):
        numbers.append(_attend(content, numbers))
    if request.choices:
        choices: Answer = []
        for token_ids in request.choices:
            choices.append(_scores(numbers[-1], token_ids))
            continued = list(numbers)
            for token_id in token_ids[:-1]:
                continued.append(_attend(token_id, continued))
                choices[-1].append(continued[-1])
        return choices
    if request.num_seqs == 1:
        tokens: list[int] = []
        while not tokens or not _ends(request, tokens):
            tokens.append(_sample(numbers[-1]))
            numbers.append(_attend(tokens[-1], numbers))
        return [tokens]
    beams: Answer = [[]]
    sequences = [numbers]
    while not beams[0] or not _ends(request, beams[0]):
        parents, token_ids = _choose_beams(request, [sequence[-1] for sequence in sequences])
        beams = [[*beams[p], token] for p, token in zip(parents, token_ids, strict=True)]
        sequences = [list(sequences[parent]) for parent in parents]
        for sequence, token in zip(sequences, token_ids, strict=True):
            sequence.append(_attend(token, sequence))
    return beams


@dataclass(frozen=True)
class _Output:
    """What a step has computed for a request: a number per sequence, or the numbers of choices."""

    request: EngineRequest
    preemptions: int
    numbers: Sequence[int]
    choices: dict[int, list[int]] | None = None


class SimulatedEngine:
    """Answers requests with a scheduler, as `EngineCore` does.

    answers: of finished requests, by request. Cancelled and failed ones have none.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        *,
        caching: bool = True,
        image_bytes: int = 1 << 20,
        config: SchedulerConfig | None = None,
    ) -> None:
        self.blocks = BlockManager(num_blocks, caching=caching)
        self._features = LRUCache[Any](image_bytes)
        self.scheduler = Scheduler(
            max_num_seqs, self.blocks, self._features, config or SchedulerConfig()
        )
        self.answers: dict[EngineRequest, Answer] = {}
        self._ended: set[EngineRequest] = set()
        self._cache = [[MISSING] * BLOCK_SIZE for _ in range(num_blocks + 1)]
        self._tokens: dict[int, int] = {}  # the newest token of each row
        self._outputs: deque[list[_Output]] = deque()

    def run(self, *requests: EngineRequest, max_steps: int = 1000) -> None:
        """Add requests and do steps until all have ended."""
        for request in requests:
            self.scheduler.add(request)
        for _ in range(max_steps):
            if self.scheduler.idle:
                return
            self.step()
        raise AssertionError(f"requests are not finished after {max_steps} steps")

    def step(self, *, fails: bool = False) -> Step:
        """Do one step and deliver the output of earlier ones.

        fails: let the requests of the step fail after they have written to the cache.
        """
        scheduler = self.scheduler
        for request in scheduler.cancelled():
            self._end(request)
        overlapped = scheduler.overlapped_steps
        if not overlapped:
            self._process_outputs()
        step = scheduler.schedule()
        self._encode(step)
        outputs = self._compute(step)
        if fails:
            for request in step.requests:
                self._end(request)
        elif step.requests:
            scheduler.update(step)
            self._outputs.append(outputs)
        self._process_outputs(keep=overlapped if step.requests else 0)
        return step

    def _end(self, request: EngineRequest) -> None:
        if request not in self._ended:
            self._ended.add(request)
            self.scheduler.remove(request)

    def _encode(self, step: Step) -> None:
        for image_hash in step.images:
            features = np.frombuffer(image_hash, dtype=np.uint8)
            self._features.put(image_hash, features)
            for request, index in step.image_users[image_hash]:
                request.image_features[index] = cast(Any, features)

    def _compute(self, step: Step) -> list[_Output]:
        for source, target in step.block_copies:
            self._cache[target] = list(self._cache[source])
        outputs = []
        for request in step.decoding:
            numbers = []
            for row, table in zip(request.rows, request.block_tables, strict=True):
                (number,) = self._extend(table, request.num_computed_tokens, [self._tokens[row]])
                numbers.append(number)
                self._tokens[row] = _sample(number)
            outputs.append(_Output(request, request.num_preemptions, numbers))
        for chunk in step.chunks:
            request = chunk.request
            if request.embeds is None:
                request.embeds = cast(Any, self._merge(request))
            contents = cast(Any, request.embeds)[chunk.start : chunk.start + chunk.length]
            number = self._extend(request.block_tables[0], chunk.start, contents)[-1]
            if chunk.is_last:
                request.embeds = None
                self._tokens[request.rows[0]] = _sample(number)
                outputs.append(_Output(request, request.num_preemptions, [number]))
        for choices in step.choices:
            scores = self._score(choices.request, choices.start, choices.stop)
            preemptions = choices.request.num_preemptions
            outputs.append(_Output(choices.request, preemptions, [], scores))
        return outputs

    def _extend(self, table: Sequence[int], start: int, contents: Sequence[int]) -> list[int]:
        """Compute the numbers of the positions from `start` on and write them to the cache."""
        before = [number for block in table for number in self._cache[block]][:start]
        for position, content in enumerate(contents, start):
            before.append(_attend(content, before))
            self._write(table, position, before[-1])
        return before[start:]

    def _score(self, request: EngineRequest, start: int, stop: int) -> dict[int, list[int]]:
        """The numbers of the tokens of choices, which lie in scratch blocks one after the other."""
        (table,), scratch, end = request.block_tables, request.scratch_blocks, 0
        prompt = [number for block in table for number in self._cache[block]]
        prompt = prompt[: request.num_prompt_tokens]
        slots: dict[int, range] = {}
        for index in range(start, stop):
            slots[index] = range(end, end + len(request.choices[index]) - 1)
            end += len(slots[index])
            for slot, token_id in zip(slots[index], request.choices[index][:-1], strict=True):
                own = [
                    self._cache[scratch[before // BLOCK_SIZE]][before % BLOCK_SIZE]
                    for before in range(slots[index].start, slot)
                ]
                self._write(scratch, slot, _attend(token_id, [*prompt, *own]))
        return {
            index: [self._cache[scratch[slot // BLOCK_SIZE]][slot % BLOCK_SIZE] for slot in own]
            for index, own in slots.items()
        }

    def _write(self, table: Sequence[int], position: int, number: int) -> None:
        block = table[position // BLOCK_SIZE]
        assert block != NULL_BLOCK
        assert not self.blocks.num_unowned([block])
        assert not self.blocks.is_shared(block)
        self._cache[block][position % BLOCK_SIZE] = number

    def _merge(self, request: EngineRequest) -> list[int]:
        contents, begin = _contents(request), 0
        for index, end in enumerate(request.hashes.image_ends):
            features = cast(Any, request.image_features.get(index, np.empty(0)))
            if features.tobytes() != request.hashes.images[index]:
                contents[begin:end] = [MISSING] * (end - begin)
            begin = end
        request.image_features.clear()
        return contents + request.output_token_ids

    def _process_outputs(self, keep: int = 0) -> None:
        while len(self._outputs) > keep:
            for output in self._outputs.popleft():
                current = output.preemptions == output.request.num_preemptions
                if current and output.request not in self._ended:
                    self._process(output)

    def _process(self, output: _Output) -> None:
        request, numbers = output.request, output.numbers
        if output.choices is not None:
            scores = cast(Answer, request.choice_scores)
            for index, added in output.choices.items():
                scores[index] += added
            if max(output.choices, default=-1) + 1 == len(request.choices):
                self._finish(request, scores)
        elif request.choices:
            scores = [_scores(numbers[0], token_ids) for token_ids in request.choices]
            request.choice_scores = cast(Any, scores)
        elif request.num_seqs == 1:
            request.output_token_ids.append(_sample(numbers[0]))
            if _ends(request, request.output_token_ids):
                self._finish(request, [request.output_token_ids])
        else:
            parents, tokens = _choose_beams(request, numbers)
            beams = cast(Answer, request.beam_search or [[]])
            beams = [[*beams[p], token] for p, token in zip(parents, tokens, strict=True)]
            request.beam_search = cast(Any, beams)
            if _ends(request, beams[0]):
                self._finish(request, beams)
            else:
                self.scheduler.fork(request, parents)
                self._tokens.update(zip(request.rows, tokens, strict=True))

    def _finish(self, request: EngineRequest, answer: Answer) -> None:
        self.answers[request] = answer
        self._end(request)


def _contents(request: EngineRequest) -> list[int]:
    """The content of each position of a prompt."""
    return [hash(tuple(position)) for position in request.hashes.positions.tolist()]


def _attend(content: int, before: Sequence[int]) -> int:
    return abs(hash((content, *before)))


def _sample(number: int) -> int:
    return number % VOCAB


def _scores(number: int, token_ids: Sequence[int]) -> list[int]:
    """The scores of a choice begin with that of its first token after the prompt."""
    return [hash((number, token_ids[0]))]


def _choose_beams(request: EngineRequest, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
    drawn = [abs(hash((beam, *numbers))) for beam in range(request.num_seqs)]
    return [number % len(numbers) for number in drawn], [number // 8 % VOCAB for number in drawn]


def _ends(request: EngineRequest, token_ids: Sequence[int]) -> bool:
    end_id = cast(RecordingSink, request.sink).end_id
    return token_ids[-1] == end_id or len(token_ids) == request.max_tokens
