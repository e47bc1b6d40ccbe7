"""Comparison of fine-tuning with golden data: what the authors' training computed.

A folder has a `cases.json` with losses, gradients (also in `gradients*.safetensors`) and optimizer
steps (final weights in `steps.safetensors`) of a small model, and tolerances for each; a
`labels.json` with samples and their token ids and labels; and images. The small model is that of
another golden folder, named by the hash of its file.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xgenmm.config import XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.evaluation.case import Case
from xgenmm.evaluation.golden import golden_model
from xgenmm.files import read_json, read_json_object
from xgenmm.finetuning.batch import IGNORED, Row, SpecialIds, count_labels, embed_rows
from xgenmm.finetuning.conversation import special_ids, tokenize
from xgenmm.finetuning.images import ImageReader
from xgenmm.finetuning.module import TrainedModel, freeze_vision
from xgenmm.finetuning.samples import parse_sample
from xgenmm.finetuning.step import Stepper, StepSettings
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.tiling import tile_image
from xgenmm.preprocessing.tokenizer import Tokenizer

_PARENTS = 3  # how far above a folder its model is looked for


def is_finetuning(golden: Mapping[str, Any]) -> bool:
    """Whether a `cases.json` describes losses and optimizer steps."""
    return "loss" in golden and "steps" in golden


def check_finetuning(
    folder: Path, golden: Mapping[str, Any], tokenizer: Path | None, models: Sequence[Path]
) -> Iterator[Case]:
    """Compare every case of labels, losses, gradients and steps.

    Raises ValueError if the model is in none of the folders, or `tokenizer` is None.
    """
    cases = _GoldenCases(folder, golden, find_model(folder, golden, models))
    yield from cases.losses()
    yield from cases.steps()
    if (folder / "labels.json").exists():
        if tokenizer is None:
            problem = "has labels.json: give the tokenizer of v1.5 with --tokenizer FOLDER"
            raise ValueError(f"{folder} {problem}")
        yield from check_labels(folder, tokenizer)


def find_model(folder: Path, golden: Mapping[str, Any], models: Sequence[Path]) -> Path:
    """Return the golden folder with the model of fine-tuning cases.

    Looks in `models`, then in folders named `golden` beside and above `folder`.
    """
    wanted = golden["model_sha256"]
    above = list(folder.absolute().parents)[:_PARENTS]
    near = [path for parent in above for path in sorted(parent.glob("golden/*")) if path.is_dir()]
    for candidate in (folder, *models, *above, *near):
        file = candidate / "model.safetensors"
        if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == wanted:
            return candidate
    raise ValueError(
        f"{folder} needs a golden folder whose model.safetensors has the sha256 {wanted}: give it "
        "with --model FOLDER"
    )


class _GoldenCases:
    """The cases of one folder and the model that they were computed with."""

    def __init__(self, folder: Path, golden: Mapping[str, Any], model: Path) -> None:
        self._folder, self._golden, self._model_folder = folder, golden, model
        self._model_golden = read_json_object(model / "cases.json")
        vocabulary = golden["about"]["small_vocabulary"]
        special = self._model_golden["special_token_ids"]
        self._special = SpecialIds(
            vocabulary["pad"], vocabulary["<image>"], tuple(sorted(special.values()))
        )
        limits = golden["tolerances"]
        self._smallest_norm = limits["grad_norms"]["of_norms_above"]
        self._tolerances = {
            "ids": 0.0,
            "loss": limits["loss"]["allow_absolute"],
            "grad_norm": limits["grad_norms"]["allow_relative"],
            "gradient": limits["gradients"]["allow_relative_l2"],
            "small_grad_norm": self._smallest_norm,
            "zero": 0.0,
            "rate": 0.0,
            "step_loss": limits["steps_losses"]["allow_absolute"],
            "norm": limits["steps_norms_before_clipping"]["allow_relative"],
            "change": limits["steps_change"]["allow"],
            "change_norm": limits["steps_change_norms"]["allow_relative"],
        }
        self._batches = {case["name"]: case for case in golden["loss"]}
        self._rows = dict[str, list[Row]]()

    def losses(self) -> Iterator[Case]:
        """Compare the loss and all gradients of each batch."""
        module = self._load()
        stored = load_file(self._folder / "gradients.safetensors")
        full_of = self._golden.get("full_gradients_of")
        full = load_file(self._folder / "gradients_full.safetensors") if full_of else {}
        for description in self._golden["loss"]:
            name = description["name"]
            case = self._case("loss", name)
            rows = self._read(name, module.model)
            self._compare_batch(case, module.model, rows, description)
            loss = _backward(module, rows)
            case.record("loss", abs(loss - description["loss"]))
            norms = self._golden["grad_norms"][name]
            for parameter, expected in norms.items():
                found = module.model.get_parameter(parameter).grad
                self._compare_norm(case, expected, found)
                if expected is not None and found is not None and expected > self._smallest_norm:
                    key, keep = f"{name}/{parameter}", self._rows_of(parameter)
                    if key in stored:
                        _compare_relative(case, "gradient", stored[key], found[keep])
                    if name == full_of:
                        _compare_relative(case, "gradient", full[parameter], found)
            unexpected = {key for key, _ in module.trained_parameters()} ^ norms.keys()
            case.record("zero", len(unexpected))
            yield case
        if self._golden["loss"] and "nothing_labelled" in self._golden["about"]:
            yield self._nothing_labelled(module, self._golden["loss"][0]["name"])

    def steps(self) -> Iterator[Case]:
        """Compare the losses, norms, rates and final weights of each run of optimizer steps."""
        stored = load_file(self._folder / "steps.safetensors")
        for run in self._golden["steps"]:
            case, module = self._case("steps", run["name"]), self._load()
            initial = {name: p.detach().clone() for name, p in module.trained_parameters()}
            settings = StepSettings(
                learning_rate=run["learning_rate"],
                weight_decay=run["weight_decay"],
                accumulation=run["gradient_accumulation_steps"],
                warmup_steps=run["warmup_steps"],
                total_steps=run["total_training_steps"],
                authors=True,
            )
            stepper = Stepper(module, settings)
            batches = [self._read(name, module.model) for name in run["batches"]]
            starts = range(0, len(batches), settings.accumulation)
            results = [stepper.step(batches[i : i + settings.accumulation]) for i in starts]
            losses = [loss for result in results for loss in result.losses]
            norms = [norm for result in results for norm in result.norms]
            rates = [result.rate for result in results]
            _compare_numbers(case, "step_loss", run["losses"], losses)
            _compare_numbers(case, "norm", run["norms_before_clipping"], norms, relative=True)
            _compare_numbers(case, "rate", run["rates"], rates)
            for name, parameter in module.trained_parameters():
                change = (parameter.detach() - initial[name]).norm().item()
                expected_norm = run["change_norms"][name]
                if expected_norm:
                    case.record("change_norm", abs(change - expected_norm) / expected_norm)
                else:
                    case.record("zero", change)
                key, keep = f"{run['name']}/{name}", self._rows_of(name)
                if key in stored and expected_norm:
                    start = initial[name][keep]
                    expected = stored[key] - start
                    _compare_relative(case, "change", expected, parameter.detach()[keep] - start)
            yield case

    def _case(self, kind: str, name: str) -> Case:
        return Case(f"{self._folder.name}/{kind}/{name}", tolerances=self._tolerances)

    def _load(self) -> TrainedModel:
        model = golden_model(self._model_folder, self._model_golden)
        freeze_vision(model)
        return TrainedModel(model, self._special)

    def _read(self, name: str, model: XGenMM) -> list[Row]:
        """Return the rows of a batch, with their images."""
        if name not in self._rows:
            tiling, side = model.config.tiling, model.config.vision.image_size
            self._rows[name] = [
                Row(
                    tuple(row["input_ids"]),
                    tuple(row["labels"]),
                    tuple(
                        tile_image(read_image(self._folder / file), tiling, side)
                        for file in row["images"]
                    ),
                )
                for row in self._batches[name]["rows"]
            ]
        return self._rows[name]

    def _rows_of(self, parameter: str) -> Any:
        """The rows of a parameter that are stored."""
        rows = self._golden["small_parameters"].get(parameter)
        return slice(None) if rows is None else rows

    def _compare_batch(
        self, case: Case, model: XGenMM, rows: Sequence[Row], description: Mapping[str, Any]
    ) -> None:
        """Compare the places of the labels among text and vision tokens."""
        with torch.no_grad():
            inputs = embed_rows(model, rows, self._special)
        for expected, targets in zip(
            description["fused_label_positions"], inputs.targets, strict=True
        ):
            # The token at a position is predicted from the one before.
            found = (1 + (targets != IGNORED).nonzero().flatten()).tolist()
            case.compare_ids("label_ids", expected, found)

    def _compare_norm(self, case: Case, expected: float | None, found: torch.Tensor | None) -> None:
        if expected is None or found is None:
            one_is_missing = (expected is None) != (found is None)
            case.record("zero", float("inf") if one_is_missing else 0.0)
        elif expected > self._smallest_norm:
            case.record("grad_norm", abs(found.norm().item() - expected) / expected)
        else:
            case.record("small_grad_norm", found.norm().item())

    def _nothing_labelled(self, module: TrainedModel, name: str) -> Case:
        """A batch without labels has the loss NaN and gradients of exactly 0."""
        case = self._case("loss", "nothing_labelled")
        rows = [
            Row(row.ids, (IGNORED,) * len(row.ids), row.images)
            for row in self._read(name, module.model)
        ]
        loss = _backward(module, rows)
        case.record("zero", 0.0 if loss != loss else float("inf"))
        for _, parameter in module.trained_parameters():
            grad = parameter.grad
            case.record("zero", float("inf") if grad is None else grad.abs().max().item())
        return case


def check_labels(folder: Path, tokenizer: Path) -> Iterator[Case]:
    """Compare the ids and labels of each sample, and whether a faulty one is refused."""
    tokens = Tokenizer.from_folder(tokenizer, "slow", XGenMMConfig().additional_ids)
    special = special_ids(tokens)
    for description in read_json(folder / "labels.json", list[dict[str, Any]]):
        case = Case(f"{folder.name}/labels/{description['name']}")
        sample = parse_sample(description["sample"])
        if "input_ids" in description:
            found = tokenize(sample.turns, tokens)
            labels = description.get("labels_meant", description["labels"])
            case.compare_ids("ids", description["input_ids"], found.ids)
            case.compare_ids("label_ids", labels, found.labels)
            in_loss = description.get("labels_in_loss")
            if in_loss is not None:
                case.compare_ids("loss_label_ids", in_loss, special.learned(found.labels))
        if {"skipped", "error", "model"} & description.keys():
            refused = sample.faults or not _can_read(sample.images, folder)
            case.compare_ids("fault_ids", [True], [bool(refused)])
        yield case


def _can_read(images: Sequence[str], folder: Path) -> bool:
    try:
        for image in images:
            ImageReader().read(image, folder)
    except InputError:
        return False
    return True


def _backward(module: TrainedModel, rows: Sequence[Row]) -> float:
    """Return the mean loss of a batch, NaN without labels, and leave its gradients."""
    module.zero_grad(set_to_none=True)
    labels = count_labels(rows, module.special)
    loss = module(rows)
    (loss / max(labels, 1)).backward()
    return loss.item() / labels if labels else float("nan")


def _compare_relative(case: Case, stage: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Record the L2 norm of the difference over that of `expected`."""
    same_shape = expected.shape == found.shape
    norm = expected.norm().item()
    difference = (found - expected).norm().item() if same_shape else float("inf")
    if norm:
        case.record(stage, difference / norm)


def _compare_numbers(
    case: Case,
    stage: str,
    expected: Sequence[float],
    found: Sequence[float],
    *,
    relative: bool = False,
) -> None:
    if len(expected) != len(found):
        case.record(stage, float("inf"))
    for a, b in zip(expected, found, strict=False):
        case.record(stage, abs(a - b) / (abs(a) if relative and a else 1.0))
