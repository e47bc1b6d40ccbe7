"""The scheduler's decisions, tested without a model."""

import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.engine_requests import LATENTS, RecordingSink, engine_request, image
from tests.support.simulated_engine import SimulatedEngine, expected_answer
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.scheduler import (
    TOKENS_PER_TILE,
    ChoicesChunk,
    PrefillChunk,
    SchedulerConfig,
    Step,
)


def text(number: int, length: int) -> Sequence[int]:
    """A text of which no block equals one of another number."""
    return range(1000 * number, 1000 * number + length)


def engine_with(
    *requests: EngineRequest,
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    budget: int = 512,
    idle_budget: int | None = None,
    overlapped_steps: int = 0,
    **settings: Any,
) -> SimulatedEngine:
    """An engine in which the requests wait."""
    config = SchedulerConfig(budget, idle_budget or budget, overlapped_steps)
    engine = SimulatedEngine(num_blocks, max_num_seqs, config=config, **settings)
    for request in requests:
        engine.scheduler.add(request)
    return engine


def spans(step: Step) -> list[tuple[EngineRequest, int, int]]:
    """The prompt chunks of a step as (request, start, length)."""
    return [(chunk.request, chunk.start, chunk.length) for chunk in step.chunks]


def compute(engine: SimulatedEngine) -> Step:
    """Plan a step and count it as computed, without any output."""
    step = engine.scheduler.schedule()
    engine.scheduler.update(step)
    return step


def test_scheduler_does_not_import_torch() -> None:
    program = "import sys, xgenmm.engine.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# Queue and admission


def test_requests_are_admitted_in_order_of_arrival_to_the_lowest_rows() -> None:
    first, beams, last = engine_request(), engine_request(num_beams=3), engine_request()
    engine = engine_with(first, beams, last, max_num_seqs=3)
    scheduler = engine.scheduler
    assert compute(engine).admitted == scheduler.running == [first]
    assert list(scheduler.waiting) == [beams, last]  # `last` would fit but must not overtake
    scheduler.remove(first)
    assert compute(engine).admitted == [beams]
    assert beams.rows == [0, 1, 2]
    scheduler.remove(beams)
    assert compute(engine).admitted == [last]
    assert last.rows == [0]
    scheduler.remove(last)
    assert scheduler.idle
    assert scheduler.free_rows == {0, 1, 2}


def test_choices_need_a_single_row() -> None:
    assert engine_request(num_beams=4).num_seqs == 4
    assert engine_request(num_beams=4, choices=[[1], [2]]).num_seqs == 1


def test_blocks_are_taken_for_the_whole_prompt() -> None:
    requests = [engine_request(text(i, length)) for i, length in enumerate((70, 40, 10))]
    engine = engine_with(*requests, num_blocks=4, budget=45)
    assert spans(compute(engine)) == [(requests[0], 0, 45)]
    assert len(requests[0].block_tables[0]) == 3
    for _ in range(3):
        compute(engine)
    assert engine.blocks.num_free == 1
    # The last request would fit but must not overtake.
    assert list(engine.scheduler.waiting) == requests[1:]
    engine.scheduler.remove(requests[0])
    compute(engine)
    assert engine.scheduler.running == requests[1:]


def test_cancelled_and_expired_requests_are_found_whether_running_or_waiting() -> None:
    sinks = [RecordingSink() for _ in range(3)]
    requests = [engine_request(sink=sink) for sink in sinks]
    engine = engine_with(*requests, max_num_seqs=1)
    scheduler = engine.scheduler
    compute(engine)
    assert scheduler.cancelled() == scheduler.expired(1e9) == []
    sinks[0].cancelled = sinks[2].cancelled = True
    requests[1].deadline = 5.0
    assert scheduler.cancelled() == [requests[0], requests[2]]
    assert scheduler.expired(5.1) == [requests[1]]
    scheduler.remove(requests[1])
    assert list(scheduler.waiting) == [requests[2]]


# Prefixes


def test_equal_prefixes_share_blocks() -> None:
    first, second = engine_request(100), engine_request([*range(100, 196), 7, 8], max_tokens=1)
    engine = engine_with(first)
    compute(engine)
    free = engine.blocks.num_free
    engine.scheduler.add(second)
    step = compute(engine)
    assert second.block_tables[0][:3] == first.block_tables[0][:3]
    assert second.block_tables[0][3] != first.block_tables[0][3]
    assert engine.blocks.num_free == free - 1
    assert second.num_cached_tokens == 96
    assert spans(step) == [(second, 96, 2)]


def test_at_least_one_token_of_a_known_prompt_is_computed() -> None:
    first, second = engine_request(96), engine_request(96)
    engine = engine_with()
    engine.run(first)
    engine.scheduler.add(second)
    assert spans(engine.step()) == [(second, 64, 32)]


def test_blocks_can_be_found_when_they_are_full_and_computed() -> None:
    request = engine_request(100)
    engine = engine_with(request, budget=40)
    found = []
    for _ in range(3):
        compute(engine)
        found.append(engine.blocks.num_cached)
    assert found == [1, 2, 3]


def test_blocks_of_a_failed_step_are_not_found() -> None:
    request = engine_request(100)
    engine = engine_with(request)
    engine.step(fails=True)
    assert engine.blocks.num_cached == 0
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_next_turn_finds_the_blocks_of_prompt_and_answer() -> None:
    first = engine_request(60, max_tokens=40)
    engine = engine_with(first)
    compute(engine)
    for token_id in range(40):
        first.output_token_ids.append(token_id)
        compute(engine)
    engine.scheduler.remove(first)
    # The newest of 100 tokens was never computed.
    assert engine.blocks.num_cached == 3
    turn = engine_request([*range(100, 160), *range(40), 7])
    engine.scheduler.add(turn)
    assert spans(compute(engine)) == [(turn, 96, 5)]


def test_without_caching_nothing_is_found() -> None:
    engine = engine_with(caching=False, image_bytes=0)
    for _ in range(2):
        request = engine_request(100, image(2))
        engine.run(request)
        assert request.num_cached_tokens == 0
        assert engine.answers[request] == expected_answer(request)


def test_requests_that_wait_for_the_budget_find_what_earlier_ones_have_computed() -> None:
    requests = [engine_request(100, image(4)) for _ in range(4)]
    engine = engine_with(*requests, budget=4 * TOKENS_PER_TILE + 116)
    encoded = 0
    while not engine.scheduler.idle:
        encoded += len(engine.step().images)
    assert encoded == 1
    assert [request.num_cached_tokens for request in requests] == [0, 96, 96, 96]


# Token budget


def test_prompt_is_prefilled_in_chunks() -> None:
    request = engine_request(1200)
    engine = engine_with(request)
    chunks = []
    while not request.decoding:
        chunks += spans(compute(engine))
    assert chunks == [(request, 0, 512), (request, 512, 512), (request, 1024, 176)]
    assert compute(engine).decoding == [request]


def test_decoding_requests_come_first_and_prompts_share_what_is_left() -> None:
    running = [engine_request(text(0, 5)), engine_request(text(1, 5), num_beams=3)]
    engine = engine_with(*running, budget=50)
    engine.step()
    prompts = [engine_request(text(i, length)) for i, length in ((2, 30), (3, 100), (4, 10))]
    for request in prompts:
        engine.scheduler.add(request)
    step = engine.step()
    assert step.decoding == running
    assert spans(step) == [(prompts[0], 0, 30), (prompts[1], 0, 16)]
    step = engine.step()
    assert step.decoding == [*running, prompts[0]]
    assert spans(step) == [(prompts[1], 16, 45)]


def test_budget_is_larger_while_nobody_decodes() -> None:
    request = engine_request(400)
    engine = engine_with(engine_request(5, max_tokens=2), budget=10, idle_budget=100)
    engine.step()
    engine.scheduler.add(request)
    assert spans(engine.step()) == [(request, 0, 9)]
    assert spans(engine.step()) == [(request, 9, 100)]


def test_default_budgets_of_a_device() -> None:
    cpu, cuda = map(SchedulerConfig.for_device, ("cpu", "cuda"))
    assert (cpu.max_num_batched_tokens, cpu.max_idle_batched_tokens) == (512, 512)
    assert (cuda.max_num_batched_tokens, cuda.max_idle_batched_tokens) == (512, 2048)
    assert (cpu.overlapped_steps, cuda.overlapped_steps) == (0, 1)
    assert SchedulerConfig.for_device("cuda", 4096).max_idle_batched_tokens == 4096


# Images


def test_images_take_their_share_of_the_budget() -> None:
    first, second = engine_request(text(0, 10), image(2, 1)), engine_request(10, image(1, 2))
    engine = engine_with(first, second, budget=3 * TOKENS_PER_TILE + 20)
    step = engine.step()
    assert step.num_tiles == 3
    # Of the first, 170 and 18 tokens; of the second, 85 and the 2 that are left.
    assert spans(step) == [(first, 0, 2 * LATENTS + 10), (second, 0, 2)]


def test_prompt_waits_for_all_of_its_images() -> None:
    request = engine_request(10, image(4, 1), image(3, 2))
    engine = engine_with(request, budget=400)
    step = engine.step()
    assert (step.num_tiles, step.chunks) == (4, [])
    step = engine.step()
    assert step.num_tiles == 3
    assert spans(step) == [(request, 0, 7 * LATENTS + 10)]


def test_image_larger_than_the_budget_is_encoded_without_other_images_and_prompts() -> None:
    first = engine_request(text(0, 5))
    large = engine_request(text(1, 5), image(20, 1))
    other = engine_request(text(2, 5), image(1, 2))
    engine = engine_with(first, large, other)
    assert spans(engine.step()) == [(first, 0, 5)]
    step = engine.step()
    assert (step.decoding, step.num_tiles, step.chunks) == ([first], 20, [])
    step = engine.step()
    assert spans(step) == [(large, 0, 20 * LATENTS + 5), (other, 0, LATENTS + 5)]
    assert step.num_tiles == 1


def test_image_of_several_requests_is_encoded_once() -> None:
    first, second = (engine_request(text(i, 10), image(2, 1), image(1, i + 2)) for i in range(2))
    engine = engine_with(first, second)
    step = engine.step()
    shared, *_ = first.hashes.images
    assert list(step.images) == [*first.hashes.images, second.hashes.images[1]]
    assert step.num_tiles == 4
    assert step.image_users[shared] == [(first, 0), (second, 0)]
    assert [request for request, _, _ in spans(step)] == [first, second]


def test_image_of_an_earlier_request_is_not_encoded_again() -> None:
    request = engine_request([1, 2], image(2))
    engine = engine_with()
    engine.run(engine_request(10, image(2)))
    engine.scheduler.add(request)
    step = engine.step()
    assert (step.images, request.num_cached_tokens) == ({}, 0)
    assert spans(step) == [(request, 0, 2 * LATENTS + 2)]


def test_images_within_a_cached_prefix_are_not_encoded() -> None:
    images = image(8, 1), image(2, 2)  # 32 and 8 vision tokens
    engine = engine_with(image_bytes=0)
    engine.run(engine_request(10, *images))
    request = engine_request([1, 2], *images)
    engine.scheduler.add(request)
    step = engine.step()
    assert request.num_cached_tokens == 32
    assert list(step.images) == [request.hashes.images[1]]
    assert spans(step) == [(request, 32, 10)]


# Choices


def scored(step: Step) -> list[tuple[int, int]]:
    """The choices of a step as (start, stop)."""
    return [(choices.start, choices.stop) for choices in step.choices]


def test_choices_are_scored_in_groups_that_fit_the_budget() -> None:
    request = engine_request(8, choices=[[1, 2, 3, 4, 5]] * 5)
    engine = engine_with(request, budget=8)  # the last token of a choice is not computed
    free = []
    assert spans(engine.step()) == [(request, 0, 8)]
    groups = []
    while not engine.scheduler.idle:
        free.append(engine.blocks.num_free)
        groups += scored(engine.step())
    assert groups == [(0, 2), (2, 4), (4, 5)]
    assert free == [63] * 3  # the scratch blocks of each step were given back
    assert engine.answers[request] == expected_answer(request)


def test_tokens_of_choices_are_computed_without_the_last() -> None:
    request = engine_request(10, choices=[[1, 2, 3], [4], [5, 6]])
    assert ChoicesChunk(request, 0, 3).token_ids == [[1, 2], [5]]
    assert ChoicesChunk(request, 1, 2).token_ids == []


def test_choices_of_one_token_need_no_scratch_blocks() -> None:
    request = engine_request(32, choices=[[1], [2], [3]])
    engine = engine_with(num_blocks=1)
    engine.run(request)
    assert engine.answers[request] == expected_answer(request)
    assert engine.scheduler.num_preemptions == 0


def test_choice_larger_than_the_budget_is_scored_alone() -> None:
    request = engine_request(5, choices=[[1, 2], [3] * 70, [4, 5]])
    engine = engine_with(request, budget=20)
    engine.step()
    step = engine.scheduler.schedule()
    assert scored(step) == [(0, 1)]
    assert len(request.scratch_blocks) == 1
    engine.scheduler.update(step)
    step = engine.scheduler.schedule()
    assert scored(step) == [(1, 2)]
    assert len(request.scratch_blocks) == 3  # for 69 tokens
    engine.scheduler.remove(request)  # as when the step fails
    assert engine.blocks.num_free == 64


def test_choices_are_split_when_their_scratch_blocks_do_not_fit() -> None:
    request = engine_request(100, choices=[[i] * 60 for i in range(4)])
    engine = engine_with(num_blocks=6)  # 4 for the prompt and 2 for one choice at a time
    engine.run(request)
    assert engine.answers[request] == expected_answer(request)
    assert engine.scheduler.num_preemptions == 0


def test_choices_take_free_blocks_before_those_of_newer_requests() -> None:
    older = engine_request(text(0, 32), choices=[[1] * 30, [2] * 30])
    newer = engine_request(text(1, 32), max_tokens=30)
    engine = engine_with(older, newer, num_blocks=4)
    engine.run()
    assert newer.num_preemptions == 0
    assert engine.answers[older] == expected_answer(older)


def test_request_whose_last_choices_are_on_their_way_is_not_scheduled() -> None:
    request = engine_request(10, choices=[[1, 2], [3, 4]])
    engine = engine_with(request, overlapped_steps=1)
    steps = [compute(engine) for _ in range(3)]
    assert [len(step.requests) for step in steps] == [1, 1, 0]


# Beams


def test_beams_share_blocks_and_copy_those_that_they_write_to() -> None:
    request = engine_request(40, num_beams=3)
    engine = engine_with(request)
    compute(engine)
    ((prompt, partial),) = request.block_tables
    engine.scheduler.fork(request, [0, 0, 0])
    assert request.block_tables == [[prompt, partial]] * 3
    assert engine.blocks.num_free == 62
    step = compute(engine)
    # Two beams write to copies and the last one in place.
    first, second, third = (table[1] for table in request.block_tables)
    assert [table[0] for table in request.block_tables] == [prompt] * 3
    assert len({first, second, partial}) == 3
    assert third == partial
    assert step.block_copies == [(partial, first), (partial, second)]
    assert engine.blocks.num_free == 60
    assert compute(engine).block_copies == []

    engine.scheduler.fork(request, [1, 1, 2])  # the first beam has no successor
    assert engine.blocks.num_free == 61
    step = compute(engine)
    assert [source for source, _ in step.block_copies] == [second]
    assert [table[1] for table in request.block_tables][1:] == [second, third]
    engine.scheduler.remove(request)
    assert engine.blocks.num_free == 64


def test_beams_of_a_full_block_take_new_ones_without_copies() -> None:
    request = engine_request(64, num_beams=3)
    engine = engine_with(request)
    compute(engine)
    shared = list(request.block_tables[0])
    engine.scheduler.fork(request, [0, 0, 0])
    assert compute(engine).block_copies == []
    assert [table[:2] for table in request.block_tables] == [shared] * 3
    assert len({table[2] for table in request.block_tables}) == 3


def test_tokens_wait_for_the_host_while_a_grammar_or_beams_need_them() -> None:
    for settings in ({}, {"num_beams": 2}, {"grammar": SimpleNamespace(ready=True)}):
        request = engine_request(num_beams=settings.pop("num_beams", 1))
        request.grammar = cast(Any, settings.get("grammar"))
        engine = engine_with(request, budget=6, overlapped_steps=1)
        compute(engine)
        assert engine.scheduler.overlapped_steps == 1  # still in its prompt
        compute(engine)
        sampled = request.grammar is None and request.num_seqs == 1
        assert engine.scheduler.overlapped_steps == (1 if sampled else 0)


def test_request_whose_mask_is_not_ready_is_left_out_of_the_step() -> None:
    slow, other = engine_request(10), engine_request(12)
    grammar = SimpleNamespace(ready=False)
    slow.grammar = cast(Any, grammar)
    engine = engine_with(slow, other)
    compute(engine)
    assert compute(engine).decoding == [other]
    grammar.ready = True
    assert compute(engine).decoding == [slow, other]


def test_request_whose_last_token_is_on_its_way_is_not_scheduled() -> None:
    request = engine_request(10, max_tokens=3)
    engine = engine_with(request, overlapped_steps=1)
    steps = [compute(engine) for _ in range(4)]
    assert [len(step.requests) for step in steps] == [1, 1, 1, 0]
    engine = engine_with(engine_request(10, max_tokens=1))
    steps = [compute(engine) for _ in range(2)]
    assert [len(step.requests) for step in steps] == [1, 0]


# Preemption


def tight_engine(**settings: Any) -> tuple[SimulatedEngine, EngineRequest, EngineRequest]:
    """An engine whose blocks are all taken by two requests of 60 tokens, each a block short."""
    older, newer = (engine_request(text(i, 60), max_tokens=30) for i in range(2))
    engine = engine_with(older, newer, num_blocks=4, **settings)
    engine.step()
    assert engine.blocks.num_free == 0
    return engine, older, newer


def step_until_preemption(engine: SimulatedEngine) -> Step:
    for _ in range(10):
        step = engine.step()
        if step.freed_rows:
            return step
    raise AssertionError("no request was preempted")


@pytest.mark.parametrize("overlapped_steps", [0, 1])
def test_newest_request_is_preempted_and_resumes(overlapped_steps: int) -> None:
    engine, older, newer = tight_engine(overlapped_steps=overlapped_steps)
    late = engine_request(5)
    engine.scheduler.add(late)
    row = newer.rows[0]
    step = step_until_preemption(engine)
    assert step.freed_rows == [row]
    assert step.decoding == [older]
    assert (step.admitted, step.chunks) == ([], [])  # nobody takes the place in the same step
    assert list(engine.scheduler.waiting) == [newer, late]
    assert (newer.rows, newer.block_tables, newer.num_computed_tokens) == ([], [], 0)
    assert newer.num_preemptions == engine.scheduler.num_preemptions == 1
    output = list(newer.output_token_ids)
    assert len(output) == 5 - overlapped_steps

    while newer not in engine.scheduler.running:
        step = engine.step()
    assert older in engine.answers
    assert newer.num_prefill_tokens == 60 + len(output)
    # The older request has taken the second block; the first was still found.
    assert spans(step) == [(newer, 32, 28 + len(output)), (late, 0, 5)]
    engine.run()
    for request in (older, newer, late):
        assert engine.answers[request] == expected_answer(request)
    assert newer.output_token_ids[: len(output)] == output


def test_preempted_request_finds_its_own_blocks_with_output() -> None:
    older, newer = (engine_request(text(i, 60), max_tokens=60) for i in range(2))
    engine = engine_with(older, newer, num_blocks=6)
    compute(engine)
    while not newer.num_preemptions:
        older.output_token_ids.append(1)
        newer.output_token_ids.append(2)
        compute(engine)
    assert len(newer.output_token_ids) == 37  # 97 tokens, 96 of them computed
    assert newer.block_hashes == newer.hashes.blocks_with_output([2] * 37)
    engine.scheduler.remove(older)
    # The older request has taken the third block.
    assert spans(compute(engine)) == [(newer, 64, 33)]


def test_newest_request_gives_way_itself_if_it_needs_the_block() -> None:
    older = engine_request(text(0, 40), max_tokens=20)
    newer = engine_request(text(1, 60), max_tokens=20)
    engine = engine_with(older, newer, num_blocks=4)
    engine.step()
    step = step_until_preemption(engine)
    assert step.decoding == [older]
    assert list(engine.scheduler.waiting) == [newer]
    engine.run()
    assert older.num_preemptions == 0
    for request in (older, newer):
        assert engine.answers[request] == expected_answer(request)


def test_request_is_preempted_in_the_middle_of_its_prompt() -> None:
    older = engine_request(text(0, 62), max_tokens=20)
    engine = engine_with(older, num_blocks=4, budget=11, idle_budget=512)
    engine.step()
    newer = engine_request(text(1, 64))
    engine.scheduler.add(newer)
    chunks = []
    while not newer.num_preemptions:
        step = engine.step()
        chunks += spans(step)
    assert chunks == [(newer, 0, 10), (newer, 10, 10)]
    assert step.decoding == [older]
    assert newer.embeds is None
    engine.run()
    assert engine.answers[newer] == expected_answer(newer)


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    older = engine_request(text(0, 60), max_tokens=20)
    beams = engine_request(text(1, 33), num_beams=3)  # its beams take more than its prompt
    engine = engine_with(older, beams, num_blocks=6)
    step = step_until_preemption(engine)
    assert step.decoding == [older]
    assert engine.blocks.num_free == 3  # enough for the prompt
    assert step.admitted == []
    assert engine.step().admitted == [beams]
    engine.run()
    assert engine.answers[beams] == expected_answer(beams)


def test_request_is_not_preempted_in_the_step_that_admits_it() -> None:
    older = engine_request(text(0, 32), choices=[[1] * 60])
    engine = engine_with(older, num_blocks=3)
    engine.step()
    newer = engine_request(text(1, 32))
    engine.scheduler.add(newer)
    assert scored(engine.step()) == [(0, 1)]
    assert newer.num_preemptions == 0
    assert list(engine.scheduler.waiting) == [newer]


def test_request_that_loses_its_blocks_to_choices_is_dropped_from_the_step() -> None:
    older = engine_request(text(0, 32), choices=[[1] * 70])
    newer = engine_request(text(1, 32))
    engine = engine_with(older, newer, num_blocks=4)
    engine.step()
    row = newer.rows[0]
    step = engine.step()
    assert scored(step) == [(0, 1)]
    assert (step.decoding, step.freed_rows) == ([], [row])
    assert list(engine.scheduler.waiting) == [newer]
    engine.run()
    assert engine.answers[newer] == expected_answer(newer)


def test_preempted_choices_are_scored_again() -> None:
    older = engine_request(text(0, 60), max_tokens=20)
    choices = engine_request(text(1, 32), choices=[[i] * 20 for i in range(9)])
    engine = engine_with(older, choices, num_blocks=4, budget=20, idle_budget=40)
    groups = []
    while not choices.num_preemptions:
        groups += scored(engine.step())
    assert 0 < len(groups) < 9
    engine.run()
    for request in (older, choices):
        assert engine.answers[request] == expected_answer(request)


def test_queued_images_are_encoded_again_after_a_preemption() -> None:
    older = engine_request(text(0, 60), max_tokens=40)
    newer = engine_request(text(1, 50), image(2), max_tokens=40)
    engine = engine_with(older, newer, num_blocks=4, image_bytes=0)
    encoded = 0
    while not engine.scheduler.idle:
        encoded += len(engine.step().images)
    assert newer.num_preemptions > 0
    assert encoded == 1 + newer.num_preemptions
    assert engine.answers[newer] == expected_answer(newer)


def test_chunk_knows_whether_a_token_follows() -> None:
    request = engine_request(20)
    assert not PrefillChunk(request, 0, 19).is_last
    assert PrefillChunk(request, 19, 1).is_last
