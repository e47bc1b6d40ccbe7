"""`xgenmm parity` on the golden fine-tuning cases; deliberate mistakes in the training fail."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support import golden_data
from xgenmm.__main__ import main
from xgenmm.evaluation.parity import check_folder
from xgenmm.finetuning import batch, conversation, module, step
from xgenmm.finetuning.batch import Row, SpecialIds
from xgenmm.finetuning.conversation import Turn
from xgenmm.finetuning.module import TrainedModel
from xgenmm.finetuning.step import Stepper
from xgenmm.models import attention, image_features, xgenmm
from xgenmm.preprocessing.tokenizer import Tokenizer

Patch = pytest.MonkeyPatch


def test_every_case_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = golden_data.folder("finetuning"), golden_data.folder("v15_anyres")
    tokenizer = golden_data.folder("tokenizer") / "checkpoint"
    options = ["--model", str(model), "--tokenizer", str(tokenizer)]
    assert main(["parity", str(folder), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "60 passed, 0 failed"
    for kind, count in (("loss", 11), ("steps", 6), ("labels", 43)):
        assert sum(f" finetuning/{kind}/" in line for line in lines) == count


def no_regrouping(patch: Patch) -> None:
    patch.setattr(xgenmm, "regroup", lambda features, columns, rows: features)


def padding_in_the_resampler(patch: Patch) -> None:
    real = image_features.padding_mask
    patch.setattr(xgenmm, "padding_mask", lambda *args: torch.ones_like(real(*args)))


def short_window(patch: Patch) -> None:
    real = attention.sliding_window_mask
    patch.setattr(batch, "sliding_window_mask", lambda a, b, window: real(a, b, window - 1))


def special_labels_learned(patch: Patch) -> None:
    patch.setattr(SpecialIds, "learned", lambda self, labels: list(labels))


def visible_padding(patch: Patch) -> None:
    real = batch.embed_rows
    patch.setattr(
        module,
        "embed_rows",
        lambda model, rows, special, **options: real(
            model, rows, replace(special, pad=-1), **options
        ),
    )


def no_shift(patch: Patch) -> None:
    real = batch.embed_rows

    def unshifted(*args: Any, **options: Any) -> batch.Inputs:
        inputs = real(*args, **options)
        return replace(inputs, targets=inputs.targets.roll(1, 1))

    patch.setattr(module, "embed_rows", unshifted)


def mean_of_rows(patch: Patch) -> None:
    real = TrainedModel.forward

    def forward(self: TrainedModel, rows: list[Row]) -> torch.Tensor:
        counts = [batch.count_labels([row], self.special) for row in rows]
        means = [real(self, [row]) / n for row, n in zip(rows, counts, strict=True) if n]
        return torch.stack(means).mean() * sum(counts)

    patch.setattr(TrainedModel, "forward", forward)


def corrected_loop(patch: Patch) -> None:
    """Clips at the step only, and takes the mean over all labels."""
    real = Stepper.__init__

    def init(self: Stepper, trained: TrainedModel, settings: step.StepSettings) -> None:
        real(self, trained, replace(settings, authors=False))

    patch.setattr(Stepper, "__init__", init)


def no_clipping(patch: Patch) -> None:
    real = torch.nn.utils.clip_grad_norm_
    patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: real(p, 1e9))


def full_last_group(patch: Patch) -> None:
    real = Stepper.step

    def made(self: Stepper, batches: list[list[Row]]) -> step.StepResult:
        self.settings = replace(self.settings, accumulation=len(batches))
        return real(self, batches)

    patch.setattr(Stepper, "step", made)


def early_warmup(patch: Patch) -> None:
    real = transformers.get_scheduler
    patch.setattr(step, "get_scheduler", lambda n, o, warmup, total: real(n, o, warmup - 1, total))


def no_decay_of_norms(patch: Patch) -> None:
    def make(trained: TrainedModel, settings: step.StepSettings) -> object:
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in trained.trained_parameters() if p.dim() > 1]},
            {
                "params": [p for _, p in trained.trained_parameters() if p.dim() == 1],
                "weight_decay": 0.0,
            },
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        warmup, total = settings.warmup_steps, settings.total_steps
        return optimizer, transformers.get_scheduler("cosine", optimizer, warmup, total)

    patch.setattr(step, "make_optimizer", make)


def zeros_instead_of_none(patch: Patch) -> None:
    real = TrainedModel.forward
    patch.setattr(
        TrainedModel,
        "forward",
        lambda self, rows: (
            real(self, rows) + sum(0 * p.sum() for _, p in self.trained_parameters())
        ),
    )


def questions_learned(patch: Patch) -> None:
    real = conversation._parts
    patch.setattr(
        conversation,
        "_parts",
        lambda turns: ((text, learned or "user" in text) for text, learned in real(turns)),
    )


def cut_too_early(patch: Patch) -> None:
    real = conversation.tokenize

    def short(turns: list[Turn], tokenizer: Tokenizer) -> conversation.Tokens:
        return real(turns, tokenizer, 2047)

    patch.setattr("xgenmm.evaluation.finetuning_parity.tokenize", short)


@pytest.mark.parametrize(
    ("mistake", "kind", "name"),
    [
        (no_regrouping, "loss", "single"),
        (padding_in_the_resampler, "loss", "aspects"),
        (short_window, "loss", "three_rows"),
        (special_labels_learned, "loss", "special_labels"),
        (visible_padding, "loss", "special_labels"),
        (no_shift, "loss", "text_only"),
        (mean_of_rows, "loss", "text_only"),
        (corrected_loop, "steps", "accumulate_8"),
        (no_clipping, "steps", "accumulate_1"),
        (full_last_group, "steps", "accumulate_2_rest"),
        (early_warmup, "steps", "accumulate_1"),
        (no_decay_of_norms, "steps", "weight_decay"),
        (zeros_instead_of_none, "steps", "weight_decay"),
        (questions_learned, "labels", "one_turn"),
        (cut_too_early, "labels", "exactly_2048"),
    ],
)
def test_mistake_fails(
    tmp_path: Path, monkeypatch: Patch, mistake: Callable[[Patch], None], kind: str, name: str
) -> None:
    folder = folder_with_case(tmp_path, kind, name)
    mistake(monkeypatch)
    models = [golden_data.folder("v15_anyres")]
    cases = list(check_folder(folder, golden_data.folder("tokenizer") / "checkpoint", models))
    assert f"golden/{kind}/{name}" in [case.name for case in cases if not case.passed]


def folder_with_case(target: Path, kind: str, name: str) -> Path:
    """A copy of the golden folder that compares one case only."""
    folder = target / "golden"
    shutil.copytree(golden_data.folder("finetuning"), folder)
    golden = json.loads((folder / "cases.json").read_text())
    labels = json.loads((folder / "labels.json").read_text())
    steps = [run for run in golden["steps"] if (kind, run["name"]) == ("steps", name)]
    needed = {name} if kind == "loss" else set[str]()
    golden["steps"] = steps
    del golden["about"]["nothing_labelled"]
    if kind == "steps":  # the batches of its runs, compared as well
        needed |= set(steps[0]["batches"])
    golden["loss"] = [case for case in golden["loss"] if case["name"] in needed]
    labels = [case for case in labels if (kind, case["name"]) == ("labels", name)]
    (folder / "cases.json").write_text(json.dumps(golden))
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def test_model_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_with_case(tmp_path, "loss", "single")
    assert main(["parity", str(folder)]) == 1
    assert "needs a golden folder whose model.safetensors has the sha256 d68c62f0" in (
        capsys.readouterr().out
    )
