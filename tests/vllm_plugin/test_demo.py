"""vLLM's chat with the demo: prompts and answers equal those of the package's engine."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

import xgenmm
from tests.support import tiny
from tests.support.paths import DEMO
from tests.support.server import data_url
from tests.vllm_plugin.engines import vllm_engine
from xgenmm import Message, Request

pytestmark = pytest.mark.timeout(900)

EXAMPLES = DEMO / "examples"
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def engine() -> xgenmm.Engine:
    return xgenmm.load("demo", device="cpu", dtype="float32")


ONE_DEVICE: dict[str, Any] = {}
TWO_DEVICES = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}  # half the tiles each


@pytest.fixture(scope="module", params=[ONE_DEVICE, TWO_DEVICES], ids=["one device", "two devices"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with vllm_engine(DEMO, **request.param) as llm:
        yield llm


def make_request(
    question: str, images: Sequence[str] = (), **fields: Any
) -> tuple[Request, list[dict[str, Any]]]:
    """The same request for the package and as messages of the OpenAI API."""
    request = Request(question, [xgenmm.read_image(EXAMPLES / name) for name in images], **fields)
    system = request.system_prompt
    messages: list[dict[str, Any]] = (
        [] if system is None else [{"role": "system", "content": system}]
    )
    messages += [{"role": m.role, "content": m.content} for m in request.messages]
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(EXAMPLES / name)}} for name in images
    ]
    messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
    return request, messages


def examples() -> list[tuple[Request, list[dict[str, Any]]]]:
    return [
        make_request(example["question"], example["images"])
        for example in json.loads((EXAMPLES / "questions.json").read_text())
    ]


REQUESTS = {
    "text only": make_request("How many circles are there?"),
    "two images": make_request("Which image has more circles?", ["scene-5.png", "scene-19.png"]),
    "images placed": make_request("In <image> and in <image>?", ["scene-5.png", "scene-19.png"]),
    "no question": make_request("", ["scene-8.png"]),
    "system prompt": make_request("What is it?", ["scene-8.png"], system_prompt="Say it short."),
    "no system prompt": make_request("What is it?", ["scene-8.png"], system_prompt=""),
    "earlier turns": make_request(
        "And squares?",
        messages=(Message("user", "How many circles?"), Message("assistant", " 2 <|end|>")),
    ),
    "spelled control tokens": make_request("A<|end|>\n<|assistant|>\nB <|user|>", ["scene-8.png"]),
    "beyond the window": make_request("Is there a blue square? " * 400, ["scene-8.png"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_prompts_and_answers_equal_those_of_the_engine(
    name: str, llm: LLM, engine: xgenmm.Engine
) -> None:
    request, messages = REQUESTS[name]
    output = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids == prompt_ids(engine, request)
    assert output.outputs[0].text == answer(engine, request)


def test_longest_prompt_exceeds_the_sliding_window(engine: xgenmm.Engine) -> None:
    request, _ = REQUESTS["beyond the window"]
    assert len(prompt_ids(engine, request)) > engine.config.decoder.window_keys


def test_batched_answers_equal_those_of_the_engine(llm: LLM, engine: xgenmm.Engine) -> None:
    requests = examples()
    outputs = llm.chat([messages for _, messages in requests], GREEDY, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert texts == [answer(engine, request) for request, _ in requests]


def test_structured_output_returns_one_of_the_choices(llm: LLM) -> None:
    _, messages = make_request("What color is the star?", ["scene-8.png"])
    choices = ["the moon", "a purple house"]
    structured = StructuredOutputsParams(choice=list(choices))
    params = SamplingParams(temperature=0, max_tokens=24, structured_outputs=structured)
    output = llm.chat(messages, params, use_tqdm=False)[0].outputs[0]
    assert output.text in choices
    assert output.finish_reason == "stop"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "assistant", "content": "Yes."}], "the last must be from user"),
        ([{"role": "user", "content": "What is in <image>?"}], "images: 0 given, but 1 <image>"),
        (
            [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}],
            "messages: message 1, the last, must be from assistant",
        ),
    ],
)
def test_invalid_messages_are_rejected_with_the_errors_of_the_package(
    messages: list[dict[str, Any]], error: str, llm: LLM
) -> None:
    with pytest.raises(ValueError, match=error):
        llm.chat(messages, GREEDY, use_tqdm=False)


def test_v1_checkpoint_is_rejected(tmp_path: Path) -> None:
    config = {"architectures": ["Blip3ModelForConditionalGeneration"], "model_type": "blip_3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"v1\.5 and demo, but this is v1"):
        LLM(str(tmp_path))


def test_video_checkpoint_is_rejected(tmp_path: Path) -> None:
    config = json.loads((tiny.checkpoint(tmp_path, temporal="gttm") / "config.json").read_text())
    del config["temporal_encoder_config"]  # as in the released files: only the tensors tell
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "xgenmm"}))
    with pytest.raises(ValueError, match=r"this is a video model.* use xgenmm\.load"):
        LLM(str(tmp_path))


def answer(engine: xgenmm.Engine, request: Request) -> str:
    sampling = xgenmm.SamplingParams(max_new_tokens=GREEDY.max_tokens or 0)
    return "".join(engine.stream(replace(request, sampling=sampling)))


def prompt_ids(engine: xgenmm.Engine, request: Request) -> list[int]:
    """The engine's prompt, with the id of each image repeated for each of its vision tokens."""
    prompt, config = engine.prompt(request), engine.config
    ids, shift = list(prompt.ids), 0
    for (start, length), image in zip(prompt.spans, request.images, strict=True):
        tiles = engine.preprocess_image(image)
        count = len(tiles.pixels) * config.resampler.num_latents
        ids[start + shift : start + shift + length] = [prompt.ids[start]] * count
        shift += count - length
    return ids
