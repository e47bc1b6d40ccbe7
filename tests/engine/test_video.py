"""Clips in the engine: as alone, in steps, cached and checked, on tiny video checkpoints."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import xgenmm
from tests.support import clips, tiny
from xgenmm import Engine, InputError, Message, Request, SamplingParams
from xgenmm.config import TilingMode
from xgenmm.engine.reference import answer_text as alone
from xgenmm.engine.scheduler import TOKENS_PER_TILE, SchedulerConfig
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tiling import TiledImage, tile_image
from xgenmm.preprocessing.video import FrameSelection, Video, decode_video

CACHE_BYTES = 1 << 22


@pytest.fixture(scope="module", params=["gttm", "token_learner"])
def loaded(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Engine:
    return xgenmm.load(tiny.checkpoint(tmp_path_factory.mktemp("video"), temporal=request.param))


@pytest.fixture
def engine(loaded: Engine) -> Iterator[Engine]:
    """An engine with empty caches."""
    started = Engine(loaded.model, loaded.tokenizer, 6, CACHE_BYTES)
    yield started
    started.close()
    assert started.status().free_blocks == started.num_blocks


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each step has encoded; 0 stands for a clip's temporal encoder."""
    counts, features, clip_tokens = list[int](), XGenMM.features, XGenMM.clip_tokens

    def encode(model: XGenMM, images: Sequence[TiledImage]) -> list[torch.Tensor]:
        counts.append(len(images))
        return features(model, images)

    def pool(model: XGenMM, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        counts.append(0)
        return clip_tokens(model, latents)

    monkeypatch.setattr(XGenMM, "features", encode)
    monkeypatch.setattr(XGenMM, "clip_tokens", pool)
    return counts


def clip(frames: int, seed: int = 0) -> list[Image.Image]:
    noise = np.random.default_rng(seed).integers(0, 256, (frames, 2, 3, 3), dtype=np.uint8)
    return [Image.fromarray(frame).resize((40, 30)) for frame in noise]


def asking(question: str, video: Any = (), limit: int = 12, **settings: Any) -> Request:
    return Request(question, sampling=SamplingParams(limit, **settings), video=video)


def test_clips_beside_other_requests_get_the_answers_they_get_alone(engine: Engine) -> None:
    requests = [
        asking("What happens?", clip(8)),
        Request("What is it?", clip(1, 1), sampling=SamplingParams(40)),
        asking("What is a video?", limit=40),
        asking("Which way?", clip(3, 2), num_beams=3),
        asking("Which way does it move?", clip(16, 3), temperature=1.0, seed=4),
        asking("What happens?", [*clip(2, 5), *clip(2, 5)]),
    ]
    answers = [engine.stream(request) for request in requests]
    for answer, request in zip(answers, requests, strict=True):
        assert answer.text() == alone(engine, request), request
    assert [answer.usage.image_tokens for answer in answers] == [
        engine.config.clip_tokens * bool(request.images or request.video) for request in requests
    ]


def test_images_frames_and_arrays_are_the_same_clip(engine: Engine) -> None:
    frames = clip(4)
    expected = engine.stream(asking("What happens?", frames)).text()
    array = np.stack([np.asarray(frame) for frame in frames])
    assert engine.stream(asking("What happens?", array)).text() == expected
    images = Request("What happens?", frames, sampling=SamplingParams(12))
    assert engine.stream(images).text() == expected
    placed = asking("<image>\nWhat happens?", [engine.preprocess_image(one) for one in frames])
    assert engine.stream(placed).text() == expected


def test_order_of_the_frames_is_part_of_the_clip(engine: Engine, encoded: list[int]) -> None:
    frames = clip(4)
    forward, backward = asking("What happens?", frames), asking("What happens?", frames[::-1])
    expected = alone(engine, forward), alone(engine, backward)
    encoded.clear()
    assert engine.stream(forward).text() == expected[0]
    assert engine.stream(backward).text() == expected[1]
    assert encoded == [4, 0, 0]  # the same frames, but another clip


def test_frames_are_encoded_within_the_budget_of_a_step(loaded: Engine, encoded: list[int]) -> None:
    budget = 2 * TOKENS_PER_TILE
    small = Engine(
        loaded.model,
        loaded.tokenizer,
        cache_bytes=CACHE_BYTES,
        scheduler_config=SchedulerConfig(budget, budget),
    )
    request = asking("What happens?", clip(7))
    assert small.stream(request).text() == alone(loaded, request)
    assert encoded[:5] == [2, 2, 2, 1, 0]
    small.close()


def test_second_question_about_a_clip_encodes_nothing(engine: Engine, encoded: list[int]) -> None:
    frames = clip(8)
    said = engine.stream(asking("What happens?", frames)).text()
    first = list(encoded)
    assert (sum(first), first[-1]) == (8, 0)
    turns = (Message("user", "What happens?"), Message("assistant", said))
    questions = [
        asking("Which way?", frames),
        Request("And then?", messages=turns, video=frames, sampling=SamplingParams(12)),
        Request("Which way?", system_prompt="Be brief.", video=frames, sampling=SamplingParams(12)),
    ]
    texts = [engine.stream(question).text() for question in questions]
    assert encoded == first
    assert texts == [alone(engine, question) for question in questions]


def test_without_caches_answers_are_the_same(loaded: Engine) -> None:
    bare = Engine(loaded.model, loaded.tokenizer, cache_bytes=CACHE_BYTES, prefix_caching=False)
    for frames in (clip(8), clip(8), clip(1)):
        request = asking("What happens?", frames)
        assert bare.stream(request).text() == alone(loaded, request)
    assert bare.status().image_cache_bytes == 0
    bare.close()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asking("<image> or <image>?", clip(2)), "^question: <image> occurs 2 times .*one clip"),
        (Request("?", clip(2), video=clip(2)), "^video: cannot be combined with images"),
        (Request("?", clip(65)), "^images: 65 frames given, but a clip may have at most 64"),
        (asking("?", clip(65)), "^video: 65 frames given, but a clip may have at most 64"),
        (asking("?", np.zeros((2, 4, 4), np.uint8)), r"^video: .* not uint8 \[2, 4, 4\]"),
        (asking("?", np.zeros((2, 4, 4, 3))), r"^video: .* not float64 \[2, 4, 4, 3\]"),
        (asking("<image>?"), "^images: 0 given, but 1 <image>"),
    ],
)
def test_invalid_clip_is_rejected(engine: Engine, request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.stream(request_)


def test_image_model_gets_frames_as_images_if_it_takes_several(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    frames = clip(2)
    interleave = xgenmm.load(tiny.checkpoint(tmp_path_factory.mktemp("anyres")))
    answer = interleave.stream(asking("What happens?", frames))
    tiling, size = interleave.config.frame_tiling, interleave.config.vision.image_size
    tiled = [tile_image(frame, tiling, size) for frame in frames]
    assert [len(one.pixels) for one in tiled] == [1, 1]
    as_images = Request("What happens?", tiled, sampling=SamplingParams(12))
    assert answer.text() == alone(interleave, as_images)
    v1 = xgenmm.load(tiny.checkpoint(tmp_path_factory.mktemp("v1"), "v1"))
    with pytest.raises(InputError, match=r"^video: this model takes no videos; use xgen-mm-vid-"):
        v1.stream(asking("What happens?", frames))


def test_clip_of_a_file_is_read_once_and_its_times_are_in_the_usage(engine: Engine) -> None:
    content, read = clips.clip(count=6), list[str]()

    def decode(
        content: bytes, name: str, selection: FrameSelection, mode: TilingMode
    ) -> Video[TiledImage]:
        read.append(name)
        assert mode == engine.config.tiling.mode
        return decode_video(content, engine.preprocess_image, selection, name=name)

    selection = FrameSelection(start=0.08)
    first = engine.preprocess_video(content, selection, read=decode)
    answer = engine.stream(asking("What happens?", first))
    expected = engine.stream(asking("What happens?", xgenmm.read_video(content, start=0.08)))
    assert answer.text() == expected.text()
    usage = answer.usage
    assert (usage.video_frames, usage.frame_times) == (4, [0.08, 0.12, 0.16, 0.2])
    assert usage.video_tokens == usage.image_tokens == engine.config.clip_tokens
    assert engine.preprocess_video(content, selection, read=decode) is first
    assert len(engine.preprocess_video(content)) == 6
    assert read == ["video"]


def test_image_model_gets_as_many_frames_as_fit_beside_the_answer(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    engine = xgenmm.load(tiny.checkpoint(tmp_path_factory.mktemp("interleave")))
    video = xgenmm.read_video(clips.clip(count=20), 20)
    answer = engine.stream(asking("What happens?", video, limit=140))
    text, usage = answer.text(), answer.usage
    assert usage.video_frames is not None
    assert 3 < usage.video_frames < 20
    assert usage.frame_times is not None
    assert len(usage.frame_times) == usage.video_frames
    assert (usage.frame_times[0], usage.frame_times[-1]) == (0.0, 0.76)
    assert usage.prompt_tokens + 140 <= engine.config.decoder.max_positions
    placed = engine.stream(asking("<image>\nWhat happens?", video, limit=140))
    assert placed.text() == text
