"""From request to text: prompts, limits, stopping and cancelling, on tiny random checkpoints."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import xgenmm
from tests.support import tiny
from xgenmm import CheckpointError, Engine, InputError, Message, Request, SamplingParams
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return xgenmm.load(tiny.checkpoint(tmp_path_factory.mktemp("anyres")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("base")
    tiny.checkpoint(folder, base=True)
    # The fast convention needs a tokenizer.json, which the tiny checkpoint does not have.
    return engine_with_slow_tokenizer(folder)


def engine_with_slow_tokenizer(folder: Path) -> Engine:
    """A base model with a tokenizer of the slow convention."""
    config = read_config(folder)
    model = XGenMM(config)
    load_parameters(model, folder, device="cpu", dtype=torch.float32)
    return Engine(model, Tokenizer.from_folder(folder, "slow", config.additional_ids))


def image(width: int = 40, height: int = 30, color: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), color)


def params(limit: int = 12, **settings: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=limit, **settings)


def text(engine: Engine, request: Request) -> str:
    return "".join(engine.stream(request))


def test_answer_streams_and_reports_its_usage(engine: Engine) -> None:
    answer = engine.stream(Request("What is it?", [image()], sampling=params()))
    pieces = list(answer)
    usage = answer.usage
    assert len(pieces) > 1
    assert usage.output_tokens == 12
    assert usage.stop_reason == "length"
    assert usage.image_tokens == 4 * (1 + 4)
    prompt = engine.prompt(Request("What is it?", [image()]))
    assert usage.prompt_tokens == len(prompt.ids) - 1 + usage.image_tokens
    assert usage.time_to_first_token > 0
    assert usage.tokens_per_second > 0


def test_text_is_reproducible_and_depends_on_the_image(engine: Engine) -> None:
    one = text(engine, Request("What is it?", [image()], sampling=params()))
    assert text(engine, Request("What is it?", [image()], sampling=params())) == one
    other = Request("What is it?", [image(40, 30, "blue")], sampling=params())
    assert text(engine, other) != one


def test_requests_with_several_images_earlier_turns_or_no_image(engine: Engine) -> None:
    images = [image(40, 30), image(20, 60, "blue")]
    turns = (Message("user", "<image> What is it?"), Message("assistant", "A cat."))
    placed = Request("And <image>?", images, messages=turns, sampling=params())
    in_front = Request("And this?", images, messages=turns, sampling=params())
    assert text(engine, placed)
    answer = engine.stream(Request("And this?", images, sampling=params()))
    assert "".join(answer)
    assert answer.usage.image_tokens == 4 * (5 + 3)
    with pytest.raises(InputError, match=r"^images: 2 given, but 1 <image>"):
        engine.stream(in_front)
    alone = engine.stream(Request("Tell me a joke.", sampling=params()))
    assert "".join(alone)
    assert alone.usage.image_tokens == 0


def encoded(shown: Image.Image, format_: str = "PNG") -> bytes:
    file = io.BytesIO()
    shown.save(file, format_)
    return file.getvalue()


def test_tiles_of_a_recent_file_are_cached(engine: Engine) -> None:
    red, blue = encoded(image()), encoded(image(color="blue"))
    tiles = engine.preprocess_image(red)
    assert engine.preprocess_image(bytes(bytearray(red))) is tiles
    assert engine.preprocess_image(blue) is not tiles
    assert engine.preprocess_image(tiles) is tiles
    assert np.array_equal(engine.preprocess_image(image()).pixels, tiles.pixels)
    request = Request("What is it?", [image()], sampling=params())
    assert text(engine, replace(request, images=[tiles])) == text(engine, request)


def test_tiles_are_not_cached_without_prefix_caching(tmp_path: Path) -> None:
    uncached = xgenmm.load(tiny.checkpoint(tmp_path), prefix_caching=False)
    red = encoded(image())
    assert uncached.preprocess_image(red) is not uncached.preprocess_image(red)


def test_error_for_an_invalid_image_names_the_input(engine: Engine) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=r"^images\[3\]: "):
            engine.preprocess_image(b"no image", "images[3]")


def test_empty_question_asks_for_a_caption(engine: Engine) -> None:
    asked = Request(engine.config.text.caption_question, [image()])
    assert engine.prompt(Request("  ", [image()])) == engine.prompt(asked)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(""), r"^question: is empty and there is no image"),
        (Request("What is in <image>?"), r"^images: 0 given, but 1 <image>"),
        (Request("<image> or <image>?", [image()]), r"^images: 1 given, but 2 <image>"),
        (Request("long " * 300), r"^question: .* tokens .* more than the 255"),
    ],
)
def test_invalid_request_is_rejected(engine: Engine, request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.stream(request_)


def test_error_for_a_long_prompt_states_the_excess(engine: Engine) -> None:
    images = [image(60, 60)] * 15  # 5 tiles of 4 vision tokens each
    request = Request("What is it?", images)
    total = len(engine.prompt(request).ids) - 15 + 15 * 20
    with pytest.raises(
        InputError, match=f"takes {total} tokens .300 for 15 images.*{total - 255} more"
    ):
        engine.stream(request)


def test_answer_ends_at_the_end_of_the_context(engine: Engine) -> None:
    request = Request("word " * 60, [image()], sampling=params(2000))
    answer = engine.stream(request)
    "".join(answer)
    usage = answer.usage
    assert usage.prompt_tokens + usage.output_tokens == 256  # the window is 64 keys
    assert usage.stop_reason == "length"


def test_stop_sequence_is_cut_off(engine: Engine) -> None:
    whole = text(engine, Request("What is it?", [image()], sampling=params(30)))
    stop = whole[5:8]
    answer = engine.stream(
        Request("What is it?", [image()], sampling=params(30, stop_sequences=(stop,)))
    )
    assert "".join(answer) == whole[: whole.index(stop)]
    assert answer.usage.stop_reason == "stop"
    assert answer.usage.output_tokens < 30


def test_cancel_ends_the_answer_within_a_token(engine: Engine) -> None:
    answer = engine.stream(Request("What is it?", [image()], sampling=params(200)))
    pieces = iter(answer)
    next(pieces)
    answer.cancel()
    made = answer.usage.output_tokens
    assert list(pieces) == []
    assert answer.usage.output_tokens <= made + 1
    assert answer.usage.stop_reason == "cancelled"
    assert text(engine, Request("What is it?", [image()], sampling=params()))


def test_cancel_ends_a_beam_search(engine: Engine) -> None:
    settings = params(200, num_beams=3)
    answer = engine.stream(Request("What is it?", [image()], sampling=settings))
    answer.cancel()
    assert list(answer) == []
    assert (answer.usage.output_tokens, answer.usage.stop_reason) == (0, "cancelled")


def test_abandoned_answer_does_not_block_the_next(engine: Engine) -> None:
    request = Request("What is it?", [image()], sampling=params(200))
    expected = text(engine, request)
    abandoned = iter(engine.stream(request))
    next(abandoned)
    assert text(engine, request) == expected
    assert next(abandoned)


@contextmanager
def always_saying(engine: Engine, token: str) -> Iterator[None]:
    """Make `token` the most likely one at every step."""
    bias, number = engine.model.decoder.lm_head.bias, engine.tokenizer.id(token)
    before = float(bias[number])
    bias[number] = 1e4
    try:
        yield
    finally:
        bias[number] = before


def test_special_tokens_are_not_part_of_the_text(engine: Engine) -> None:
    with always_saying(engine, "<|user|>"):
        answer = engine.stream(Request("What is it?", [image()], sampling=params(3)))
        assert "".join(answer) == ""
    assert answer.usage.output_tokens == 3


def test_end_token_ends_the_answer(engine: Engine) -> None:
    with always_saying(engine, "<|end|>"):
        answer = engine.stream(Request("What is it?", [image()], sampling=params()))
        assert "".join(answer) == ""
    assert (answer.usage.stop_reason, answer.usage.output_tokens) == ("end", 1)


def test_seed_determines_sampled_text(engine: Engine) -> None:
    def sampled(seed: int) -> str:
        settings = params(20, temperature=1.0, seed=seed)
        return text(engine, Request("What is it?", [image()], sampling=settings))

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_beam_search_and_repetition_penalty_generate_text(engine: Engine) -> None:
    for settings in ({"num_beams": 3}, {"repetition_penalty": 2.0}):
        answer = engine.stream(Request("What?", [image()], sampling=params(8, **settings)))
        assert "".join(answer)
        assert answer.usage.output_tokens <= 8


def test_base_model_accepts_few_shot_examples(base: Engine) -> None:
    shots = (Message("user", "What is it?"), Message("assistant", "A cat."))
    request = Request("What is it?", [image(), image()], messages=shots, sampling=params())
    answer = base.stream(request)
    assert "".join(answer)
    assert answer.usage.image_tokens == 2 * 4
    prompt = base.prompt(request)
    assert [length for _, length in prompt.spans] == [4, 4]


def test_v1_model_generates_text(tmp_path: Path) -> None:
    engine = xgenmm.load(tiny.checkpoint(tmp_path, "v1"))
    assert engine.config.vision.tower == "open_clip"
    assert engine.config.resampler.text_tokens == 256
    assert text(engine, Request("What is it?", [image()], sampling=params()))


def test_load_checks_and_applies_device_and_dtype(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "tiny")
    engine = xgenmm.load(folder, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert text(engine, Request("What is it?", [image()], sampling=params()))
    with pytest.raises(InputError, match=r"^dtype: 'int3' is not one of float32"):
        xgenmm.load(folder, dtype="int3")
    with pytest.raises(InputError, match=r"^device: 'tpux' is not a device"):
        xgenmm.load(folder, device="tpux")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(CheckpointError, match="llamaforcausallm"):
        xgenmm.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        xgenmm.load(folder)
