"""lmms-eval with the demo: its results equal those of the package's own evaluation.

`make test-eval` writes the tasks before: scenes that the demo was not trained on.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

import xgenmm
from tests.support import tiny
from tests.support.paths import ROOT
from xgenmm import Request
from xgenmm.evaluation.lmms_eval_models import ChatModel, EngineModel, SimpleModel
from xgenmm.evaluation.published import published_tables
from xgenmm.preprocessing.tokenizer_files import read_vocabulary

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.timeout(900)

TASKS = ROOT / "build" / "lmms-eval"
SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep datasets out of the user's cache, and their library off the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)


def evaluated(model: EngineModel, task: str, **options: Any) -> dict[str, Any]:
    manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False)
    return dict(simple_evaluate(model, tasks=[task], task_manager=manager, **options))


def questions(data: str, split: str) -> list[dict[str, Any]]:
    lines = (TASKS / data / split / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_accuracy_equals_that_of_the_own_evaluation(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", "xgenmm", "--device", "cpu"]
    command += ["--model_args", "pretrained=demo,dtype=float32", "--tasks", "demo_generate"]
    command += ["--include_path", str(TASKS), "--output_path", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(next(tmp_path.rglob("*_results.json")).read_text())["results"]
    expected = json.loads((TASKS / "expected.json").read_text())
    found = {
        kind: round(results["demo_generate"][f"{kind},none"] * asked, 6)
        for kind, (_, asked) in expected.items()
    }
    right = {kind: float(right) for kind, (right, _) in expected.items()}
    asked = sum(asked for _, asked in expected.values())
    logger.info("right of %d: lmms-eval %d", asked, sum(found.values()))
    logger.info("right of %d: own evaluation %d", asked, sum(right.values()))
    assert found == right


def test_multiple_choice_equals_the_choices_of_the_engine() -> None:
    engine = xgenmm.load("demo", **SETTINGS)
    expected, right = [], []
    asked = questions("choice", "test")
    for question in asked:
        images = [
            xgenmm.read_image(TASKS / "choice" / "test" / name)
            for name in question["images_file_names"]
        ]
        request = Request(question["question"], images, choices=tuple(question["choices"]))
        answer = engine.stream(request)
        right.append(answer.text() == question["answer"])
        expected.append([(-s.log_probability, s.is_greedy) for s in answer.choice_scores.values()])
    results = evaluated(SimpleModel("demo", **SETTINGS), "demo_choice", log_samples=True)
    samples = sorted(results["samples"]["demo_choice"], key=lambda sample: sample["doc_id"])
    for sample, scores in zip(samples, expected, strict=True):
        losses, is_greedy = zip(*sample["filtered_resps"], strict=True)
        assert losses == pytest.approx([loss for loss, _ in scores], abs=1e-4)
        assert list(is_greedy) == [greedy for _, greedy in scores]
    assert any(greedy for scores in expected for _, greedy in scores)
    assert results["results"]["demo_choice"]["acc,none"] == sum(right) / len(right)


class RecordingModel(ChatModel):
    """Keeps what it asks the engine."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.requests: list[Request] = []
        self.answers: list[xgenmm.Answer] = []
        stream = self.engine.stream

        def record(request: Request) -> xgenmm.Answer:
            self.requests.append(request)
            self.answers.append(stream(request))
            return self.answers[-1]

        self.engine.stream = record  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with random weights and a tokenizer of single characters."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("base"), base=True)
    pieces = read_vocabulary(folder, "slow")[1]
    vocab = {piece: token for token, piece in pieces.items()}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab}
    tokenizer = {
        "version": "1.0",
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "model": {**model, "fuse_unk": True, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def few_shot_requests(base: Path, **options: Any) -> dict[str, tuple[Any, ...]]:
    """The examples of each question, and the sizes of all images."""
    model = RecordingModel(str(base), fewshot=4, **SETTINGS)
    evaluated(model, "demo_generate", gen_kwargs="max_new_tokens=2", **options)
    assert all(answer.usage.output_tokens for answer in model.answers)
    return {
        request.question: (request.messages, [np.asarray(image).shape for image in request.images])
        for request in model.requests
    }


def test_few_shot_examples_come_from_the_training_split(base: Path) -> None:
    found = few_shot_requests(base, limit=6)
    known = {(q["question"], f" {q['answer']}") for q in questions("generate", "train")}
    asked = questions("generate", "test")[:6]
    assert found.keys() == {question["question"] for question in asked}
    for question, (messages, sizes) in found.items():
        texts = [message.content for message in messages]
        examples = list(zip(texts[::2], texts[1::2], strict=True))
        assert len(set(examples)) == 4
        assert set(examples) <= known
        assert len(sizes) == "".join([question, *texts]).count("<image>")
    part = few_shot_requests(base, limit=2, offset=4)
    assert {question: found[question] for question in part} == part


def test_prompt_beyond_the_context_has_an_empty_answer(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = ChatModel(str(base), fewshot=150, **SETTINGS)
    samples = evaluated(few, "demo_generate", limit=2, log_samples=True)["samples"]
    assert [sample["filtered_resps"] for sample in samples["demo_generate"]] == [[""], [""]]
    assert "demo_generate 1: no answer: question: with its images and earlier turns" in caplog.text


def test_published_benchmarks_are_tasks_of_lmms_eval() -> None:
    index = TaskManager("ERROR").task_index
    for table in published_tables():
        for benchmark, _ in table.rows:
            task = load_yaml_config(index[benchmark.task]["yaml_path"], mode="simple")
            known = {entry["metric"] for entry in task["metric_list"]}
            assert set(benchmark.metrics) <= known, benchmark.name
