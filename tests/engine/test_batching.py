"""Many requests at once: independence, fairness, caching and failures, on tiny checkpoints."""

import asyncio
import gc
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import xgenmm
from tests.support import tiny
from xgenmm import Answer, Engine, EngineError, InputError, Message, Request, SamplingParams
from xgenmm.engine import model_runner
from xgenmm.engine.choices import choice_token_ids
from xgenmm.engine.memory import IMAGE_SHARE
from xgenmm.engine.reference import answer_text as alone
from xgenmm.engine.scheduler import Scheduler, SchedulerConfig
from xgenmm.kernels.cuda_graphs import DecodePath
from xgenmm.models.attention import Segment, UncachedAttention
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tiling import tile_image

SLOTS = 6
CACHE_BYTES = 1 << 22
BLOCK_BYTES = 2 * 2 * 32 * 32 * 4  # of the tiny checkpoint: 2 layers of width 32 in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("anyres"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Engine:
    """The engine whose model and tokenizer the other engines share."""
    return xgenmm.load(folder, max_num_seqs=1)


@pytest.fixture(scope="module")
def uncached(folder: Path) -> Iterator[Engine]:
    """An engine without caches, whose answers are the reference for those with caches."""
    started = xgenmm.load(folder, max_num_seqs=1, prefix_caching=False)
    yield started
    started.close()


@pytest.fixture(params=[0, 1], ids=["synchronous", "overlapped"])
def config(request: pytest.FixtureRequest) -> SchedulerConfig:
    return SchedulerConfig(overlapped_steps=request.param)  # 1 is the default on a GPU


@pytest.fixture
def engine(loaded: Engine, config: SchedulerConfig) -> Iterator[Engine]:
    with running_engine(loaded, config) as started:
        yield started


@contextmanager
def running_engine(loaded: Engine, config: SchedulerConfig) -> Iterator[Engine]:
    """An engine with the model of `loaded`; at the end, all of its blocks must be free."""
    started = Engine(loaded.model, loaded.tokenizer, SLOTS, CACHE_BYTES, scheduler_config=config)
    yield started
    started.close()
    assert_all_free(started)


def assert_all_free(engine: Engine) -> None:
    status = engine.status()
    assert (status.running, status.waiting) == (0, 0)
    assert status.free_blocks == status.num_blocks


def image(color: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, color)


def asking(question: str = "What is it?", *colors: str, **settings: Any) -> Request:
    limit = settings.pop("limit", 12)
    return Request(
        question,
        [image(color) for color in colors],
        sampling=SamplingParams(max_new_tokens=limit, **settings),
    )


def mixed_requests(seed: int, count: int) -> list[Request]:
    rng = random.Random(seed)
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 8},
        {"repetition_penalty": 2.0},
        {"num_beams": 3},
        {"num_beams": 2, "repetition_penalty": 1.5},
    ]
    return [
        asking(
            " ".join(rng.choices(("what", "is", "the", "red", "thing"), k=rng.randint(1, 30))),
            *rng.choices(("red", "blue", "green"), k=rng.randint(0, 2)),
            limit=rng.randint(1, 25),
            **rng.choice(settings),
        )
        for _ in range(count)
    ]


def decoding(segments: Sequence[Segment]) -> int:
    """How many sequences decode a token in a forward pass."""
    first = segments[0].mask
    return len(segments[0].positions) if first is not None and first.shape[2] == 1 else 0


@contextmanager
def decode_gate(model: XGenMM) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Block the forward passes that decode.

    Yields two events: the first such pass sets `entered`; the test sets `release` to unblock it.
    """
    original = model.forward
    entered, release = threading.Event(), threading.Event()

    def held(embeds: torch.Tensor, segments: Sequence[Segment], cache: KVCache) -> torch.Tensor:
        if decoding(segments):
            entered.set()
            assert release.wait(60)
        return original(embeds, segments, cache)

    model.forward = held  # type: ignore[method-assign]
    try:
        yield entered, release
    finally:
        release.set()
        model.forward = original  # type: ignore[method-assign]


@contextmanager
def recorded(model: Any, *names: str) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Record the calls of these methods of a model, in order."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    originals = {name: getattr(model, name) for name in names}

    def recorder(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append((name, arguments))
            return originals[name](*arguments, **named)

        return call

    for name in names:
        setattr(model, name, recorder(name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(model, name, originals[name])


@contextmanager
def failing(target: object, name: str, error: Exception, times: int) -> Iterator[None]:
    """Make the next `times` calls of a method raise `error`."""
    original: Callable[..., Any] = getattr(target, name)
    left = times

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise error
        return original(*arguments, **named)

    setattr(target, name, call)
    try:
        yield
    finally:
        setattr(target, name, original)


# Independence


@pytest.mark.parametrize("seed", range(4))
def test_answers_do_not_depend_on_the_rest_of_the_batch(engine: Engine, seed: int) -> None:
    requests = mixed_requests(seed, 20)
    answers = [engine.stream(request) for request in requests]
    for answer, request in zip(answers, requests, strict=True):
        assert answer.text() == alone(engine, request), request
    assert max(answer.usage.batch_size for answer in answers) > 1


def test_requests_are_added_while_others_run(engine: Engine) -> None:
    with decode_gate(engine.model) as (entered, release):
        first = engine.stream(asking(limit=100))
        assert entered.wait(60)
        second = engine.stream(asking("And this?", limit=3))
        release.set()
        assert second.text() == alone(engine, asking("And this?", limit=3))
    assert first.text() == alone(engine, asking(limit=100))
    assert second.usage.batch_size == 2


def test_requests_wait_for_a_free_slot(engine: Engine) -> None:
    requests = [asking(f"Number {i}?", limit=20) for i in range(3 * SLOTS)]
    answers = [engine.stream(request) for request in requests]
    assert [a.text() for a in answers] == [alone(engine, request) for request in requests]
    assert max(answer.usage.batch_size for answer in answers) == SLOTS
    assert answers[-1].usage.queue_time > answers[0].usage.queue_time


def test_answers_can_be_read_asynchronously(engine: Engine) -> None:
    async def text(answer: Answer) -> str:
        return "".join([piece async for piece in answer])

    async def both() -> list[str]:
        answers = [engine.stream(asking(question)) for question in ("One?", "Two?")]
        return await asyncio.gather(*map(text, answers))

    assert asyncio.run(both()) == [alone(engine, asking(q)) for q in ("One?", "Two?")]


@pytest.mark.parametrize("config", [0], indirect=True, ids=["synchronous"])
def test_answer_can_be_read_after_its_first_reader_closed_its_event_loop(engine: Engine) -> None:
    async def first(answer: Answer) -> str:
        async for piece in answer:
            return piece
        return ""

    with decode_gate(engine.model) as (entered, release):
        answer = engine.stream(asking(limit=100))
        begun = asyncio.run(first(answer))
        assert entered.wait(60)
        release.set()
    assert begun + answer.text() == alone(engine, asking(limit=100))


# Fairness


def test_long_prompt_is_prefilled_in_chunks_between_steps(
    loaded: Engine, config: SchedulerConfig
) -> None:
    config = replace(config, max_num_batched_tokens=16)
    long = asking("Which?", "red", "blue", "green", "black")
    expected = alone(loaded, long)
    with (
        running_engine(loaded, config) as engine,
        recorded(engine.model, "features", "forward") as calls,
    ):
        with decode_gate(engine.model) as (entered, release):
            running = engine.stream(asking(limit=60))
            assert entered.wait(60)
            answer = engine.stream(long)
            release.set()
            assert answer.text() == expected
        running.cancel()
        running.text()
    names = [name for name, _ in calls]
    encoded = [arguments[0] for name, arguments in calls if name == "features"]
    assert [sum(len(one.pixels) for one in images) for images in encoded] == [5, 5, 5, 5]
    begun = names.index("features")
    assert "features" not in {a for a, b in pairwise(names[begun:]) if b == "features"}
    passes = [arguments for name, arguments in calls[begun:] if name == "forward"]
    while_both_run = passes[: 1 + max(i for i, (_, s, _) in enumerate(passes) if len(s) > 1)]
    assert all(decoding(segments) for _, segments, _ in while_both_run)
    assert max(len(embeds) for embeds, _, _ in while_both_run) == 16


def test_waiting_images_are_encoded_together(loaded: Engine, config: SchedulerConfig) -> None:
    config = replace(config, max_num_batched_tokens=2048)
    with (
        running_engine(loaded, config) as engine,
        recorded(engine.model, "features") as calls,
    ):
        with decode_gate(engine.model) as (entered, release):
            running = engine.stream(asking())
            assert entered.wait(60)
            answers = [engine.stream(asking("What?", color)) for color in ("red", "blue", "red")]
            release.set()
        assert all(answer.text() for answer in [running, *answers])
    assert [len(arguments[0]) for _, arguments in calls] == [2]  # each image only once


# Caching


def test_second_question_prefills_only_its_own_tokens(engine: Engine, uncached: Engine) -> None:
    first, second = asking("What is it?", "red", "blue"), asking("Which color?", "red", "blue")
    engine.stream(first).text()
    with recorded(engine.model, "features", "forward") as calls:
        answer = engine.stream(second)
        assert answer.text() == uncached.stream(second).text()
    assert {name for name, _ in calls} == {"forward"}
    usage = answer.usage
    assert usage.image_tokens < usage.cached_tokens < usage.prompt_tokens
    assert len(calls[0][1][0]) == usage.prompt_tokens - usage.cached_tokens


def test_next_turn_reuses_prompt_and_answer(engine: Engine, uncached: Engine) -> None:
    first = asking("What is it?", "red", limit=40)
    said = engine.stream(first)
    text = said.text()
    turns = (Message("user", first.question), Message("assistant", text))
    follow_up = Request("And why?", first.images, messages=turns, sampling=first.sampling)
    answer = engine.stream(follow_up)
    assert answer.text() == uncached.stream(follow_up).text()
    assert answer.usage.cached_tokens > said.usage.prompt_tokens - 32


@pytest.mark.parametrize("version", ["v1.5", "v1"])
def test_caches_never_return_a_wrong_entry(tmp_path: Path, version: str) -> None:
    checkpoint = tiny.checkpoint(tmp_path / version, version)
    warm = xgenmm.load(checkpoint, max_num_seqs=2, cache_bytes=1 << 24)
    cold = xgenmm.load(checkpoint, max_num_seqs=2, prefix_caching=False)
    almost = image()
    almost.putpixel((20, 15), (255, 0, 60))
    images = [image(), almost, image(size=(30, 40)), image(size=(80, 60))]
    systems = (None, "Be kind.")
    for question in ("What is it?", "What color is this thing?"):
        for shown in images:
            for system in systems:
                request = Request(question, [shown], system, sampling=SamplingParams(8))
                assert warm.stream(request).text() == cold.stream(request).text()
    with recorded(warm.model, "features") as calls:
        warm.stream(Request("Another one?", [almost], sampling=SamplingParams(2))).text()
    assert calls == []  # cached, whatever the question


def test_caches_respect_their_limit(folder: Path) -> None:
    limit = 400_000
    small = xgenmm.load(folder, max_num_seqs=2, cache_bytes=limit)
    for number in range(24):
        request = asking(f"Number {number}?", "red", limit=2)
        small.stream(Request(request.question, [image(size=(40 + number, 30))])).cancel()
        small.stream(request).text()
        assert small.status().image_cache_bytes <= limit * IMAGE_SHARE
    assert 0 < small.status().cached_blocks <= small.status().num_blocks
    small.close()
    with pytest.raises(InputError, match=r"^cache_bytes: .* fewer than the 256"):
        xgenmm.load(folder, cache_bytes=100_000)


def test_preempted_requests_give_the_same_answers(loaded: Engine, config: SchedulerConfig) -> None:
    """The KV cache holds a few requests at their full length, and six run at once."""
    requests = [asking(f"{i}?", limit=150, temperature=1.0, seed=i) for i in range(12)]
    requests += mixed_requests(5, 20)
    tight = Engine(loaded.model, loaded.tokenizer, SLOTS, 14 * BLOCK_BYTES, scheduler_config=config)
    answers = [tight.stream(request) for request in requests]
    for answer, request in zip(answers, requests, strict=True):
        assert answer.text() == alone(loaded, request), request
    tight.close()
    assert_all_free(tight)
    assert tight.status().preemptions > 5
    assert tight.status().preemptions == sum(answer.usage.preemptions for answer in answers)


# Choices


def test_choices_are_scored_by_their_likelihood(engine: Engine) -> None:
    choices = ("red", "a blue star", "yes", "purple triangle and more")
    request = Request("What is it?", [image()], choices=choices)
    answer = engine.stream(request)
    said = answer.text()

    prompt = engine.prompt(request)
    tiles = [tile_image(image(), engine.config.tiling, engine.config.vision.image_size)]
    embeds = engine.model.merge_multimodal_embeddings(prompt, engine.model.encode(tiles))
    scores, is_greedy = [], []
    for choice in choices:
        ids = choice_token_ids(engine.tokenizer, engine.config.text, choice)
        whole = torch.cat([embeds, engine.model.embed_ids(ids)])[None]
        length = whole.shape[1]
        attend = UncachedAttention(torch.ones(length, length, dtype=torch.bool).tril().triu(-63))
        hidden = engine.model.decoder(whole, torch.arange(length)[None], attend)
        logits = engine.model.logits(hidden)[0, len(embeds) - 1 : -1].log_softmax(-1)
        scores.append(logits.gather(1, torch.tensor(ids)[:, None]).sum())
        is_greedy.append(logits.argmax(-1).tolist() == ids)
    expected = torch.stack(scores).softmax(0)
    assert answer.usage.choices is not None
    assert list(answer.usage.choices) == list(choices)
    assert list(answer.usage.choices.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert said == choices[int(expected.argmax())]
    log_probabilities = [score.log_probability for score in answer.choice_scores.values()]
    assert log_probabilities == pytest.approx(torch.stack(scores).tolist(), abs=1e-4)
    assert [score.is_greedy for score in answer.choice_scores.values()] == is_greedy
    assert answer.usage.stop_reason == "end"


def test_choices_scored_in_several_passes_have_the_same_probabilities(
    engine: Engine, config: SchedulerConfig
) -> None:
    request = Request("What?", choices=tuple(f"word {i}" for i in range(40)))
    whole = engine.stream(request)
    text = whole.text()
    config = replace(config, max_num_batched_tokens=20, max_idle_batched_tokens=20)
    with running_engine(engine, config) as other:
        parts = other.stream(request)
        assert parts.text() == text
    assert parts.usage.choices == pytest.approx(whole.usage.choices, abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"choices": ("",)}, r"^choices: each must be a non-empty text"),
        ({"choices": ("a", "a")}, r"^choices: must all be different"),
        ({"choices": ("a",) * 300}, r"^choices: "),
        ({"choices": ("long " * 200, "a")}, r"^choices: the longest has more than the \d+ tokens"),
        ({"choices": ("a",), "json_schema": {}}, r"^json_schema: cannot be combined with choices"),
        (
            {"json_schema": {}, "sampling": SamplingParams(num_beams=2)},
            r"^json_schema: cannot be combined with 2 beams",
        ),
        (
            {"sampling": SamplingParams(num_beams=8)},
            rf"^num_beams: 8 beams exceed the {SLOTS} sequences of a step",
        ),
    ],
)
def test_invalid_request_is_rejected(engine: Engine, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.stream(Request("What?", **wrong))


# Lifecycle


def test_cancel_frees_the_slot_within_a_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(engine, asking("Me too?", limit=2))
    monkeypatch.setattr(engine, "end_ids", frozenset())  # no answer ends before it is cancelled
    answers = [engine.stream(asking(f"{i}?", limit=1000)) for i in range(SLOTS)]
    pieces = [iter(answer) for answer in answers]
    for one in pieces:
        next(one)
    waiting = engine.stream(asking("Me too?", limit=2))
    with (
        recorded(engine.model, "forward") as calls,
        decode_gate(engine.model) as (entered, release),
    ):
        assert entered.wait(60)
        answers[2].cancel()
        release.set()
        assert waiting.text() == expected
    assert answers[2].usage.stop_reason == "cancelled"
    # The first pass was blocked; the one after it begins the waiting request.
    segments = [arguments[1] for _, arguments in calls]
    assert [len(one) for one in segments[:2]] == [1, 2]
    assert [decoding(one) for one in segments[:2]] == [SLOTS, SLOTS - 1]
    for answer in answers:
        answer.cancel()
        answer.text()


def test_waiting_request_can_be_cancelled(engine: Engine) -> None:
    with decode_gate(engine.model) as (entered, release):
        answers = [engine.stream(asking(f"{i}?", limit=5)) for i in range(SLOTS + 1)]
        assert entered.wait(60)
        answers[-1].cancel()
        release.set()
    assert answers[-1].text() == ""
    assert answers[-1].usage.stop_reason == "cancelled"
    assert all(answer.text() for answer in answers[:-1])


def test_timeout_ends_the_answer(engine: Engine) -> None:
    answer = engine.stream(Request("What?", timeout=0.0))
    assert answer.text() == ""
    assert answer.usage.stop_reason == "timeout"


def test_failing_request_does_not_affect_others(engine: Engine) -> None:
    with decode_gate(engine.model) as (entered, release):
        running = engine.stream(asking(limit=30))
        assert entered.wait(60)
        with failing(engine.model, "merge_multimodal_embeddings", ValueError("boom"), times=1):
            wrong = engine.stream(asking("Wrong?"))
            release.set()
            with pytest.raises(EngineError, match=r"failed in the model: ValueError\('boom'\)"):
                wrong.text()
    assert wrong.usage.stop_reason == "failed"
    assert running.text() == alone(engine, asking(limit=30))


def test_failing_step_fails_its_requests_and_the_engine_continues(engine: Engine) -> None:
    with failing(engine.model, "forward", RuntimeError("boom"), times=1):
        answers = [engine.stream(asking(f"{i}?")) for i in range(2)]
        failed = 0
        for answer in answers:
            try:
                answer.text()
            except EngineError:
                failed += 1
    assert failed >= 1
    assert engine.stream(asking()).text() == alone(engine, asking())


@pytest.mark.parametrize("method", ["features", "forward", "logits", "merge_multimodal_embeddings"])
def test_out_of_memory_drops_the_caches_and_retries_once(engine: Engine, method: str) -> None:
    engine.stream(asking("Before?", "blue")).text()
    error = torch.OutOfMemoryError("CUDA out of memory")
    request = asking("What?", "red")
    with failing(engine.model, method, error, times=1):
        assert engine.stream(request).text() == alone(engine, request)
    with failing(engine.model, method, error, times=2):
        answer = engine.stream(asking("Again?", "green"))
        with pytest.raises(EngineError, match="out of memory"):
            answer.text()
    engine.check()
    assert engine.stream(request).text() == alone(engine, request)


def test_close_finishes_accepted_requests_and_refuses_new_ones(folder: Path) -> None:
    closing = xgenmm.load(folder, max_num_seqs=1)
    with decode_gate(closing.model) as (entered, release):
        running, waiting = (closing.stream(asking(question)) for question in ("One?", "Two?"))
        assert entered.wait(60)
        thread = threading.Thread(target=closing.close)
        thread.start()
        while not closing.status().closed:
            thread.join(0.001)
        with pytest.raises(EngineError, match="shut down"):
            closing.stream(asking())
        release.set()
        thread.join(60)
    assert running.text() == alone(closing, asking("One?"))
    assert waiting.text() == alone(closing, asking("Two?"))
    assert_all_free(closing)


@pytest.mark.parametrize("stall_seconds", [300.0, 0.0])
def test_check_detects_a_stuck_engine(
    loaded: Engine, config: SchedulerConfig, stall_seconds: float
) -> None:
    with running_engine(loaded, replace(config, stall_seconds=stall_seconds)) as engine:
        engine.check()
        with decode_gate(engine.model) as (entered, release):
            answer = engine.stream(asking())
            assert entered.wait(60)
            if stall_seconds:
                engine.check()
            else:
                with pytest.raises(EngineError, match="has made no step for"):
                    engine.check()
            release.set()
            assert answer.text()
        engine.check()


def test_dead_engine_is_detected_and_its_requests_fail(folder: Path) -> None:
    dying = xgenmm.load(folder, max_num_seqs=2)
    with failing(Scheduler, "schedule", SystemError("boom"), times=1):
        answer = dying.stream(asking())
        with pytest.raises(EngineError, match=r"the engine stopped: SystemError\('boom'\)"):
            answer.text()
    with pytest.raises(EngineError):
        dying.check()
    with pytest.raises(EngineError):
        dying.stream(asking())


def test_thread_of_an_unreferenced_engine_ends(folder: Path) -> None:
    before = set(threading.enumerate())
    unused = xgenmm.load(folder, max_num_seqs=1)
    unused.stream(asking()).text()
    (thread,) = set(threading.enumerate()) - before
    del unused
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_summary_is_logged(
    loaded: Engine, config: SchedulerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, summary_seconds=0.0)
    with (
        caplog.at_level("INFO", logger="xgenmm.engine.metrics"),
        running_engine(loaded, config) as engine,
    ):
        engine.stream(asking("What?", "red")).text()
    assert "1 length" in caplog.text or "1 end" in caplog.text
    assert "tiles encoded" in caplog.text


def test_static_decode_step_gives_the_same_answers(
    loaded: Engine, config: SchedulerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, steps without prompts run over the first rows, idle ones included."""
    sizes = list[int]()

    def build(model: XGenMM, cache: KVCache, *batch: torch.Tensor) -> DecodePath:
        tokens, positions, tables = batch[:3]

        def decode(rows: int) -> torch.Tensor:
            sizes.append(bucket := 1 << (rows - 1).bit_length())
            return model.decode(tokens[:bucket], positions[:bucket], tables[:bucket], cache)

        return DecodePath("kernels", "for this test", decode)

    monkeypatch.setattr(model_runner, "build_decode_step", build)
    requests = mixed_requests(9, 20)
    requests += [asking(f"{i}?", limit=120, temperature=1.0, seed=i) for i in range(8)]
    static = Engine(loaded.model, loaded.tokenizer, 8, 16 * BLOCK_BYTES, scheduler_config=config)
    answers = [static.stream(request) for request in requests]
    for answer, request in zip(answers, requests, strict=True):
        assert answer.text() == alone(loaded, request), request
        assert answer.usage.decode_path == "kernels"
    static.close()
    assert_all_free(static)
    assert static.status().preemptions > 0
    assert set(sizes) >= {1, 8}
