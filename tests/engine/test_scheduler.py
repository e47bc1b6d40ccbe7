"""The scheduler's decisions, tested without a model."""

import subprocess
import sys
from typing import Any, cast

from tests.support.engine_requests import LATENTS, RecordingSink, engine_request, image
from xgenmm.engine.request import EngineRequest
from xgenmm.engine.scheduler import (
    EncodeBatch,
    PrefillBatch,
    PrefillChunk,
    Scheduler,
    SchedulerConfig,
)


def scheduler_with(
    *requests: EngineRequest, num_slots: int = 8, config: SchedulerConfig | None = None
) -> Scheduler:
    """A scheduler that has admitted as many of the requests as fit."""
    scheduler = Scheduler(
        num_slots, config or SchedulerConfig(), lambda length: -(-length // 8) * 8
    )
    for request in requests:
        scheduler.add(request)
    list(scheduler.admit())
    return scheduler


def prefilled(request: EngineRequest) -> EngineRequest:
    """Mark the prompt of a request as computed."""
    request.num_computed_tokens = request.num_prompt_tokens
    return request


def prefill(scheduler: Scheduler) -> list[PrefillChunk]:
    work = scheduler.prefill_work()
    assert isinstance(work, PrefillBatch)
    return list(work.chunks)


def encode(scheduler: Scheduler) -> EncodeBatch:
    work = scheduler.prefill_work()
    assert isinstance(work, EncodeBatch)
    return work


def test_scheduler_does_not_import_torch() -> None:
    program = "import sys, xgenmm.engine.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_requests_are_admitted_in_order_of_arrival_to_the_lowest_slots() -> None:
    first, beams, last = engine_request(), engine_request(num_beams=3), engine_request()
    scheduler = scheduler_with(first, beams, last, num_slots=3)
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [beams, last]  # `last` would fit but must not overtake
    scheduler.remove(first)
    assert list(scheduler.admit()) == [beams]
    assert beams.slots == [0, 1, 2]
    scheduler.remove(beams)
    assert list(scheduler.admit()) == [last]
    scheduler.remove(last)
    assert scheduler.idle
    assert scheduler.free_slots == {0, 1, 2}


def test_slots_freed_during_admission_are_used() -> None:
    requests = [engine_request() for _ in range(3)]
    scheduler = scheduler_with(num_slots=1)
    for request in requests:
        scheduler.add(request)
    admitted = []
    for request in scheduler.admit():
        admitted.append(request)
        scheduler.remove(request)  # as after a failure
    assert admitted == requests


def test_choices_need_a_single_slot() -> None:
    request = engine_request(num_beams=4)
    assert request.num_slots == 4
    request.choices = [[1], [2]]
    assert request.num_slots == 1


def test_cancelled_and_expired_requests_are_found_whether_running_or_waiting() -> None:
    sinks = [RecordingSink() for _ in range(3)]
    requests = [engine_request(sink=sink) for sink in sinks]
    scheduler = scheduler_with(*requests, num_slots=1)
    assert scheduler.cancelled() == scheduler.expired(1e9) == []
    sinks[0].cancelled = sinks[2].cancelled = True
    requests[1].deadline = 5.0
    assert scheduler.cancelled() == [requests[0], requests[2]]
    assert scheduler.expired(5.1) == [requests[1]]
    scheduler.remove(requests[1])
    assert list(scheduler.waiting) == [requests[2]]


def test_prompt_is_prefilled_in_chunks() -> None:
    request = engine_request(1200)
    scheduler = scheduler_with(request)
    chunks = []
    while not request.decoding:
        (chunk,) = prefill(scheduler)
        chunks.append((chunk.start, chunk.length))
        request.num_computed_tokens += chunk.length
    assert chunks == [(0, 512), (512, 512), (1024, 176)]
    assert scheduler.prefill_work() is None


def test_chunks_of_several_prompts_fit_the_limit_with_padding() -> None:
    config = SchedulerConfig(max_chunk_tokens=64)
    requests = [engine_request(length) for length in (17, 20, 3, 2)]
    scheduler = scheduler_with(*requests, config=config)
    chunks = prefill(scheduler)
    assert [chunk.request for chunk in chunks] == requests[:2]  # each is padded to 24 positions
    assert [chunk.length for chunk in chunks] == [17, 20]


def test_pending_images_are_encoded_before_the_prefill() -> None:
    request = engine_request(10, image(3))
    scheduler = scheduler_with(request, engine_request())
    assert encode(scheduler).num_tiles == 3
    request.image_features[0] = cast(Any, "features")
    assert prefill(scheduler)[0] == PrefillChunk(request, 0, 3 * LATENTS + 10)


def test_images_are_encoded_once_within_the_limit() -> None:
    config = SchedulerConfig(max_encode_tiles=6, max_idle_encode_tiles=10)
    first = engine_request(10, image(4, 1), image(3, 2))
    second = engine_request(10, image(4, 1), image(2, 3))
    scheduler = scheduler_with(first, second, config=config)
    assert encode(scheduler).num_tiles == 9
    scheduler.add(prefilled(engine_request()))
    list(scheduler.admit())
    batch = encode(scheduler)
    assert batch.num_tiles == 6
    assert list(batch.users.values()) == [[(first, 0), (second, 0)], [(second, 1)]]
    assert batch.requests == [first, second]


def test_image_larger_than_the_limit_is_encoded_alone() -> None:
    scheduler = scheduler_with(engine_request(10, image(20, 1), image(1, 2)))
    assert encode(scheduler).num_tiles == 20


def test_images_within_a_cached_prefix_are_not_encoded() -> None:
    request = engine_request(40, image(2, 1), image(2, 2))
    request.num_computed_tokens = request.usage.cached_tokens = 2 * LATENTS
    assert request.pending_images == [1]
    request.usage.cached_tokens = 4 * LATENTS
    assert request.pending_images == []


def test_decode_batch_covers_the_slots_in_use() -> None:
    requests = [engine_request(length) for length in (10, 20, 30, 40)]
    scheduler = scheduler_with(*requests, num_slots=6)
    assert scheduler.decode_batch() is None
    prefilled(requests[0])
    prefilled(requests[2])
    requests[3].num_computed_tokens = 35
    batch = scheduler.decode_batch()
    assert batch is not None
    assert batch.requests == [requests[0], requests[2]]
    assert batch.num_slots == 4  # a power of two above slot 2
    assert batch.num_keys == 36  # the prompt being prefilled writes at position 35
    list(map(prefilled, requests))
    scheduler.add(prefilled(engine_request()))
    list(scheduler.admit())
    batch = scheduler.decode_batch()
    assert batch is not None
    assert batch.num_slots == 6  # never more than there are


def test_beams_are_not_decoded_with_overlapped_steps() -> None:
    request, config = prefilled(engine_request()), SchedulerConfig(overlapped_steps=1)
    scheduler = scheduler_with(request, config=config)
    assert scheduler.overlapped_steps == 1
    request.beam_search = cast(Any, object())
    assert scheduler.overlapped_steps == 0
    request.num_computed_tokens = 0  # still in its prompt
    assert scheduler.overlapped_steps == 1
