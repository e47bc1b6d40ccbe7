"""Random requests through the scheduler.

After each step, blocks and rows belong to those that list them; at the end, every answer is the one
that its request gets alone.
"""

import random
from collections import Counter
from typing import cast

import pytest

from tests.support.engine_requests import RecordingSink, engine_request, image
from tests.support.simulated_engine import SimulatedEngine, expected_answer
from xgenmm.config import BLOCK_SIZE
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.scheduler import TOKENS_PER_TILE, SchedulerConfig, Step
from xgenmm.models.kv_cache import NULL_BLOCK

NUM_BLOCKS = 11
MAX_NUM_SEQS = 6
NUM_REQUESTS = 100


def random_request(rng: random.Random) -> EngineRequest:
    """A request whose prompt, of up to 220 tokens, often begins like that of others."""
    images = [image(rng.choice([1, 9]), rng.randrange(3)) for _ in range(rng.choice([0, 0, 1, 2]))]
    text = [*range(rng.choice([10, 32, 64, 100])), *rng.choices(range(1000, 1003), k=30)]
    text = text[: rng.randrange(len(text) - 30, len(text)) + 1]
    sink = RecordingSink(end_id=rng.choice([None, 0]))
    kind = rng.choice(["sampled", "sampled", "sampled", "beams", "choices"])
    if kind == "choices":
        lengths = rng.choices(range(1, 30), k=rng.randrange(2, 24))
        choices = [rng.choices(range(9), k=length) for length in lengths]
        return engine_request(text, *images, sink=sink, choices=choices)
    if kind == "beams":
        return engine_request(text, *images, sink=sink, num_beams=rng.choice([2, 3]), max_tokens=50)
    return engine_request(text, *images, sink=sink, max_tokens=rng.choice([1, 2, 33, 150]))


def fits_alone(request: EngineRequest) -> bool:
    """Whether the cache holds the request when nobody else runs; the engine refuses others."""
    prompt = request.num_prompt_tokens
    if request.choices:
        return -(-prompt // BLOCK_SIZE) + 1 <= NUM_BLOCKS
    shared = prompt // BLOCK_SIZE
    grown = -(-(prompt + request.max_tokens) // BLOCK_SIZE) - shared
    return shared + request.num_seqs * grown <= NUM_BLOCKS


def check_owners(engine: SimulatedEngine) -> None:
    """Each block has as many owners as tables that list it, and each row one."""
    scheduler, blocks = engine.scheduler, engine.blocks
    owners = Counter(
        block
        for request in scheduler.running
        for table in [*request.block_tables, request.scratch_blocks]
        for block in table
    )
    assert NULL_BLOCK not in owners
    assert blocks.num_free == NUM_BLOCKS - len(owners)
    for block in range(1, NUM_BLOCKS + 1):
        assert blocks.num_unowned([block]) == (owners[block] == 0)
        assert blocks.is_shared(block) == (owners[block] > 1)
    rows = [row for request in scheduler.running for row in request.rows]
    assert sorted([*rows, *scheduler.free_rows]) == list(range(MAX_NUM_SEQS))
    for request in scheduler.running:
        assert len(request.rows) == request.num_seqs
    for request in scheduler.waiting:
        assert [*request.rows, *request.block_tables, *request.scratch_blocks] == []


def check_budget(step: Step, config: SchedulerConfig) -> None:
    """A step keeps to its budget, except for one image or one choice that alone exceeds it."""
    tokens = sum(request.num_seqs for request in step.decoding)
    tokens += sum(chunk.length for chunk in step.chunks)
    tokens += step.num_tiles * TOKENS_PER_TILE
    scored = [sum(map(len, choices.token_ids)) for choices in step.choices]
    budget = config.max_num_batched_tokens if step.decoding else config.max_idle_batched_tokens
    alone = len(step.images) == 1 and not step.chunks
    alone |= any(choices.stop == choices.start + 1 for choices in step.choices)
    assert tokens + sum(scored) <= budget or alone


@pytest.mark.parametrize(
    ("caching", "budget", "overlapped_steps"),
    [(True, 40, 0), (True, 40, 1), (True, 250, 1), (False, 250, 0)],
)
def test_random_requests_get_the_answers_that_they_get_alone(
    caching: bool, budget: int, overlapped_steps: int
) -> None:
    rng = random.Random(budget + overlapped_steps)
    config = SchedulerConfig(budget, 2 * budget, overlapped_steps)
    image_bytes = 64 if caching else 0  # holds the features of two images
    engine = SimulatedEngine(
        NUM_BLOCKS, MAX_NUM_SEQS, caching=caching, image_bytes=image_bytes, config=config
    )
    requests: list[EngineRequest] = []
    cancelled: dict[EngineRequest, int] = {}  # and when
    failed: set[EngineRequest] = set()
    counts = Counter[str]()
    while len(requests) < NUM_REQUESTS or not engine.scheduler.idle:
        if len(requests) < NUM_REQUESTS and len(engine.scheduler.waiting) < 4:
            request = random_request(rng)
            if rng.random() < 0.3 and fits_alone(request):
                requests.append(request)
                engine.scheduler.add(request)
                if rng.random() < 0.2:
                    cancelled[request] = counts["steps"] + rng.randrange(60)
        for request, when in cancelled.items():
            cast(RecordingSink, request.sink).cancelled = counts["steps"] >= when
        fails = counts["steps"] % 100 == 50
        step = engine.step(fails=fails)
        if fails:
            failed.update(step.requests)
        check_owners(engine)
        check_budget(step, config)
        queue = [*engine.scheduler.running, *engine.scheduler.waiting]
        assert queue == sorted(queue, key=requests.index)
        counts["steps"] += 1
        counts["copies"] += len(step.block_copies)
        counts["cached"] += sum(request.num_cached_tokens > 0 for request in step.admitted)
        assert counts["steps"] < 2000, "some requests starve"
    for request in requests:
        if request not in failed and request not in cancelled:
            assert engine.answers[request] == expected_answer(request)
    assert engine.blocks.num_free == NUM_BLOCKS
    assert engine.scheduler.num_preemptions > 5
    assert counts["copies"] > 20
    assert counts["cached"] > 20 or not caching
