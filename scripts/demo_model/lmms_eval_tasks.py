"""Write the evaluation set as tasks of lmms-eval, with the result of the own evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.demo_model.evaluate import measure
from scripts.demo_model.evaluation_set import EVALUATION_SEED, Case, evaluation_set
from scripts.demo_model.fonts import held_out_fonts
from scripts.demo_model.scene import COLORS, KINDS
from scripts.demo_model.wordings import QUESTION_KINDS
from xgenmm.preprocessing.prompts import IMAGE

CHOICES = {"color": COLORS, "shape": KINDS, "existence": ("no", "yes")}
"""The answers to some kinds of questions, for multiple choice."""

TASK = """\
task: {name}
dataset_path: imagefolder
dataset_kwargs:
  data_dir: {data}
training_split: train
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.visuals
doc_to_text: question
{scoring}metric_list:
{metrics}"""

SCORING = """\
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 64
process_results: !function utils.results
"""

CHOICE_SCORING = """\
doc_to_choice: choices
doc_to_target: answer
"""

UTILS = """\
def visuals(doc):
    return [image.convert("RGB") for image in doc["images"]]


def results(doc, answers):
    return {doc["kind"]: float(answers[0].lower() == doc["answer"].lower())}
"""


def write_tasks(checkpoint: Path, folder: Path, scenes: int) -> None:
    """Write tasks and data below `folder`.

    `demo_generate` asks for all of the evaluation set, and `expected.json` holds the number of
    right answers and of questions of each kind that `evaluate` finds. `demo_choice` asks the
    questions that have a list of `CHOICES`. Both have a training split, of other scenes.
    """
    cases = {
        "test": evaluation_set(EVALUATION_SEED, held_out_fonts(), scenes),
        "train": evaluation_set(EVALUATION_SEED + 1, held_out_fonts(), scenes),
    }
    for split, asked in cases.items():
        _write_split(folder / "generate" / split, asked)
        _write_split(folder / "choice" / split, [case for case in asked if case.kind in CHOICES])
    metrics = "".join(_metric(kind) for kind in QUESTION_KINDS)
    _write_task(folder, "demo_generate", "generate", "generate_until", SCORING, metrics)
    _write_task(folder, "demo_choice", "choice", "multiple_choice", CHOICE_SCORING, _metric("acc"))
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    right = measure(checkpoint, scenes)
    expected = {kind: [sum(answers), len(answers)] for kind, answers in right.items()}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def _write_task(
    folder: Path, name: str, data: str, output_type: str, scoring: str, metrics: str
) -> None:
    text = TASK.format(
        name=name,
        data=json.dumps(str((folder / data).resolve())),
        output_type=output_type,
        scoring=scoring,
        metrics=metrics,
    )
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _metric(name: str) -> str:
    return f"  - metric: {name}\n    aggregation: mean\n    higher_is_better: true\n"


def _write_split(folder: Path, cases: Sequence[Case]) -> None:
    """Write the images of cases, and their questions as `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number, case in enumerate(cases):
        names = [f"{number}-{index}.png" for index in range(len(case.scenes))]
        for name, image in zip(names, case.images, strict=True):
            image.save(folder / name)
        row: dict[str, Any] = {
            "images_file_names": names,
            "kind": case.kind,
            # The images go on a line each, as in the training of the demo.
            "question": f"{IMAGE}\n" * len(names) + case.question,
            "answer": case.answer,
            "choices": list(CHOICES.get(case.kind, ())),
        }
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
