"""Data files -> samples: both formats, mixes, and every fault by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support import golden_data
from xgenmm.__main__ import main
from xgenmm.config import XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.finetuning.check import check_dataset
from xgenmm.finetuning.conversation import special_ids, tokenize
from xgenmm.finetuning.dataset import read_dataset
from xgenmm.finetuning.images import ImageReader
from xgenmm.finetuning.samples import parse_sample
from xgenmm.preprocessing.tokenizer import Tokenizer

SYSTEM = "A chat between a curious user"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    folder = golden_data.folder("tokenizer") / "checkpoint"
    return Tokenizer.from_folder(folder, "slow", XGenMMConfig().additional_ids)


def messages(
    question: Any = "<image>What?", answer: str = "A mill.", **keys: Any
) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **keys}


def llava(question: str = "<image>\nWhat?", answer: str = "A mill.", **keys: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **keys}


def test_both_formats_give_the_same_sample() -> None:
    same = [
        messages("<image>\nWhat?", images=["a.png"]),
        messages("What?", images=["a.png"]),  # without markers, images come first
        messages(
            [{"type": "image"}, {"type": "text", "text": "\nWhat?"}],
            images=["a.png"],
        ),
        messages(
            [
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "text", "text": "\nWhat?"},
            ]
        ),
        llava(image="a.png"),
        llava("What?", image=["a.png"]),
    ]
    samples = [parse_sample(record) for record in same]
    assert all(sample == samples[0] for sample in samples)
    assert samples[0].faults == []
    assert samples[0].images == ("a.png",)
    assert [turn.role for turn in samples[0].turns] == ["system", "user", "assistant"]
    assert samples[0].turns[0].text.startswith(SYSTEM)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("text", "must be an object such as"),
        ({"text": "a"}, "must have messages (with images) or conversations (with image), not text"),
        ({"messages": [], "images": []}, "messages must be a list of turns, not empty"),
        (messages(images="a.png"), "images must be a list of paths or URLs, not 'a.png'"),
        (messages(image="a.png"), "must be images (a list), not image"),
        (messages(images=["a.png", "b.png"]), "has 2 images, but 1 <image>"),
        (messages("Why?", "<image>", images=["a.png"]), "<image> outside of the user's turns"),
        (messages(images=["a.png"] * 5, question="<image>" * 5), "has 5 images, more than 4"),
        (messages([{"type": "video"}]), "parts of the type text, image or image_url"),
        (messages(3), "the content of message 1 must be text"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "has no answer"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "message 1 has the role 'tool'"),
        (messages("\ud800"), "not valid Unicode at position 0"),
        (llava(3, image="a.png"), "the value of turn 1 must be text, not a number"),  # type: ignore[arg-type]
        (llava(images=["a.png"]), "must be image, not images"),
        ({"conversations": messages()["messages"]}, "rename conversations to messages"),
    ],
)
def test_fault_says_what_would_be_right(record: object, problem: str) -> None:
    assert problem in "; ".join(parse_sample(record).faults)


def test_faults_are_named_by_file_and_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    lines = [
        json.dumps(messages(images=["a.png"])),
        "",
        "{broken",
        json.dumps(messages(images=["none.png"])),
        json.dumps(messages(images=["b.png"])),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text(json.dumps([llava(image="a.png"), {"x": 1}], indent=1))
    dataset = read_dataset(tmp_path)
    config = XGenMMConfig()
    report = check_dataset(dataset, config, tokenizer, ImageReader())
    places = [str(fault).removeprefix(f"{tmp_path}/") for fault in report.faults]
    assert [place.split(": ")[0] for place in places] == [
        "a.jsonl:3", "b.json:15", "a.jsonl:4", "a.jsonl:5",
    ]  # fmt: skip
    assert "is not valid JSON" in places[0]
    assert "image none.png" in places[2]
    assert report.counts == {tmp_path / "a.jsonl": 3, tmp_path / "b.json": 1}


def test_report_tells_lengths_and_what_is_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    Image.new("RGB", (800, 400)).save(tmp_path / "a.png")
    records = [
        messages(images=["a.png"]),
        messages("word " * 60 + "<image>", images=["a.png"]),
        messages("What?", "word " * 60 + "<|end|>"),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    report = check_dataset(read_dataset(tmp_path), XGenMMConfig(), tokenizer, ImageReader(), 64)
    assert report.images == {1: 2, 0: 1}
    tokens = tokenize(parse_sample(records[0]).turns, tokenizer)
    assert report.text_tokens[0] == len(tokens.ids)
    assert report.positions[0] == len(tokens.ids) - 1 + 3 * 128  # the whole image and a 2 x 1 grid
    assert [place.line for place in report.cut] == [2, 3]
    assert [place.line for place in report.nothing_left] == [2]
    assert [place.line for place in report.spelled] == [3]
    assert report.example.endswith("<|assistant|>\n[[A mill.<|end|>]]")
    assert special_ids(tokenizer).pad == 32011


def test_mix_takes_counts_of_files(tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 2), ("c", 3)):
        lines = [json.dumps(messages(f"Question {name}{i}?")) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines).replace("<image>", ""))
    mix = tmp_path / "mix.yaml"
    mix.write_text("data_path: {a.jsonl: 3, b.jsonl: 4, c.jsonl: null}")
    dataset = read_dataset(mix)
    assert list(dataset.counts.values()) == [3, 4, 3]
    texts = [placed.sample.turns[1].text for placed in dataset.samples]
    assert len(set(texts[:3])) == 3
    assert texts == [placed.sample.turns[1].text for placed in read_dataset(mix).samples]
    mix.write_text("data_path: {a.jsonl: many}")
    with pytest.raises(InputError, match=r"a.jsonl: many must be a file and a count"):
        read_dataset(mix)


def test_check_prints_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(messages(images=["a.png"])))
    assert main(["finetune", "demo", str(data), "--check"]) == 0
    said = capsys.readouterr().out
    assert f"1 sample of {data}" in said
    assert "[[A mill.<|end|>]]" in said
    assert said.endswith("1 sample, 0 faults\n")
    data.write_text(json.dumps(messages(images=["b.png"])))
    assert main(["finetune", "demo", str(data), "--check"]) == 1
    assert f"FAULT {data}:1: image b.png: cannot open" in capsys.readouterr().out


def test_untrusted_data_has_only_its_own_files_and_public_addresses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    sources = ["../a.png", str(tmp_path / "a.png"), "http://127.0.0.1:1/a.png"]
    lines = [json.dumps(messages(images=[source])) for source in sources]
    (folder / "data.jsonl").write_text("\n".join(lines))
    assert main(["finetune", "demo", str(folder / "data.jsonl"), "--check", "--untrusted"]) == 1
    said = capsys.readouterr().out
    assert said.count("leads out of the dataset; give a path within its folder") == 2
    assert "127.0.0.1, which has no public address" in said
