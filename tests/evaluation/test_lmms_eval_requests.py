"""Requests of lmms-eval become the prompts of the authors' evaluation; no lmms-eval is needed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.support.clips import clip
from xgenmm.config import TextConfig
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.errors import InputError
from xgenmm.evaluation.few_shot import FewShot
from xgenmm.evaluation.lmms_eval_requests import chat_request, sampling_params, user_message
from xgenmm.preprocessing.prompts import Message
from xgenmm.preprocessing.video import read_video

CHAT = TextConfig()
BASE = TextConfig("fast", "few_shot")
GREEDY = SamplingParams()


def image(color: str = "red") -> Image.Image:
    return Image.new("RGB", (4, 3), color)


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


SHOWN = {"type": "image", "url": image()}


@pytest.mark.parametrize(
    ("text", "parts", "question"),
    [
        (CHAT, [SHOWN, part("What is it?")], "<image> What is it?"),
        (CHAT, [SHOWN, SHOWN, part("Same?")], "<image> <image> Same?"),
        (CHAT, [part("Is "), SHOWN, part("red?")], "Is <image> red?"),
        (CHAT, [SHOWN, part("<image>\nWhat is it?")], "<image>\nWhat is it?"),
        (CHAT, [SHOWN, part("What is <image> in <image>?")], "<image> What is  in ?"),
        (CHAT, [part("Why <image>?")], "Why ?"),
        (BASE, [SHOWN, part("What is it?")], "<image>What is it?"),
    ],
)
def test_images_stand_where_the_message_has_them(
    text: TextConfig, parts: list[Any], question: str
) -> None:
    request = chat_request([{"role": "user", "content": parts}], text, GREEDY)
    assert request.question == question
    assert len(request.images) == parts.count(SHOWN)


def test_earlier_turns_and_system_prompt_are_kept() -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        user_message([image("red")], "Color?"),
        {"role": "assistant", "content": [part("red")]},
        user_message([image("blue")], "And here?"),
    ]
    request = chat_request(messages, CHAT, GREEDY, system_prompt="Unused.")
    assert request.system_prompt == "Be short."
    assert request.messages == (Message("user", "<image> Color?"), Message("assistant", "red"))
    assert request.question == "<image> And here?"
    assert list(request.images) == [image("red"), image("blue")]


def test_video_is_read_to_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(clip())
    part = {"type": "video", "url": str(path), "end_time": 1.0}
    request = chat_request([{"role": "user", "content": [part]}], CHAT, GREEDY, num_frames=4)
    expected = read_video(path, 4, end=1.0)
    assert (request.question, len(request.video)) == ("", 4)
    assert request.video == expected


def test_other_media_are_refused() -> None:
    sound = {"type": "audio", "url": "a.wav"}
    with pytest.raises(InputError, match="must be text, image or video, not audio"):
        chat_request([{"role": "user", "content": [sound]}], CHAT, GREEDY)
    clips = user_message(["a.mp4", "b.mp4"], "Same?")
    assert [p["type"] for p in clips["content"]] == ["video", "video", "text"]


def test_sampling_is_greedy_unless_the_task_samples() -> None:
    task = {"until": ["\n\n", "ASSISTANT:"], "temperature": 0.2, "do_sample": False, "top_p": None}
    expected = SamplingParams(1024, stop_sequences=("ASSISTANT:",), seed=3)
    assert sampling_params(task, CHAT, 1024, seed=3) == expected
    base = sampling_params(task, BASE, 1024, seed=3)
    assert base.stop_sequences == ("\n\n", "ASSISTANT:")
    sampled = {"max_new_tokens": 16384, "temperature": 0.7, "top_p": 0.9, "until": "."}
    expected = SamplingParams(2048, 0.7, 0.9, stop_sequences=(".",), seed=3)
    assert sampling_params(sampled, CHAT, 1024, seed=3) == expected


def task(**config: Any) -> Any:
    """A task whose training split shows red at 0, and its test split at 2."""
    docs = [{"q": f"{i}?", "a": ["no", f"a{i}", "no"], "color": color} for i, color in COLORS]
    names = {"task": "t", "target_delimiter": " ", "doc_to_choice": None, "doc_to_target": "a"}
    splits = {"fewshot_split": None, "training_split": None}
    return SimpleNamespace(
        config=SimpleNamespace(**names | splits | config),
        dataset={"train": docs, "test": docs},
        features=["q", "a", "color"],
        doc_to_visual=lambda doc: [image(doc["color"])],
        doc_to_text=lambda doc: doc["q"],
        doc_to_target=lambda doc: doc["a"],
    )


COLORS = list(enumerate(("red", "blue", "green", "black", "white", "red", "gray", "navy")))


def questions(examples: Any) -> list[str]:
    return [message["content"][-1]["text"] for message in examples[::2]]


@pytest.mark.parametrize("split", [None, "test"])
def test_examples_never_show_the_image_of_the_question(split: str | None) -> None:
    few_shot = FewShot(4, split=split)
    asked = [user_message([image("red")], "0?")]
    for doc_id in (0, 5):
        examples = few_shot.messages(task(), "test", doc_id, asked)
        assert len(examples) == 8
        assert len(set(questions(examples))) == 4
        assert not {"0?", "5?"} & set(questions(examples))
        assert examples[1] == {"role": "assistant", "content": " no"}  # the most frequent


def test_examples_depend_on_seed_and_question_only() -> None:
    drawn = {
        (seed, doc_id): tuple(questions(FewShot(4, seed).messages(task(), "test", doc_id, [])))
        for seed in (1, 2)
        for doc_id in range(3)
    }
    assert len(set(drawn.values())) == len(drawn)
    again = FewShot(4, 2).messages(task(), "test", 1, [])
    assert tuple(questions(again)) == drawn[2, 1]
    assert FewShot().messages(task(), "test", 1, []) == []


def test_impossible_examples_are_explained() -> None:
    with pytest.raises(InputError, match=r"^fewshot: 8 examples wanted, but the split train of t"):
        FewShot(8).messages(task(), "test", 0, [user_message([image("red")], "0?")])
    with pytest.raises(InputError, match=r"^fewshot_split: t has no split val; name one of train"):
        FewShot(1, split="val").messages(task(), "test", 0, [])
    unknown = task(doc_to_target="answer")
    unknown.doc_to_target = lambda doc: "answer"
    with pytest.raises(InputError, match=r"^fewshot_target: .* one of q, a, color"):
        FewShot(1).messages(unknown, "test", 0, [])
    assert FewShot(1, target="q").messages(unknown, "test", 0, [])[1]["content"].endswith("?")
