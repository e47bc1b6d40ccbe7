"""The optimizer step: what the default does where the authors' loop is at fault."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import checkpoint
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config
from xgenmm.finetuning.batch import IGNORED, Row, SpecialIds
from xgenmm.finetuning.module import TrainedModel, checkpoint_gradients, freeze_vision
from xgenmm.finetuning.step import Stepper, StepSettings
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tiling import TiledImage

SETTINGS = StepSettings(learning_rate=1e-2, warmup_steps=0, total_steps=10, schedule="constant")
LONG = Row(tuple(range(20, 40)), tuple(range(20, 40)))
SHORT = Row((5, 6, 7), (IGNORED, 6, 7))
EMPTY = Row((5, 6, 7), (IGNORED,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def trained(folder: Path) -> TrainedModel:
    model = XGenMM(read_config(folder))
    load_parameters(model, folder, device="cpu", dtype=torch.float32)
    freeze_vision(model)
    first = model.config.decoder.initial_vocab
    return TrainedModel(model, SpecialIds(first - 1, first, (first, first + 1, first + 2)))


def weights(module: TrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in module.trained_parameters()])


def step_from(folder: Path, batches: list[list[Row]], settings: StepSettings) -> torch.Tensor:
    """The weights after one step."""
    module = trained(folder)
    Stepper(module, settings).step(batches)
    return weights(module)


def test_accumulated_batches_are_as_one_batch(folder: Path) -> None:
    together = step_from(folder, [[LONG, SHORT]], SETTINGS)
    apart = step_from(folder, [[LONG], [SHORT]], SETTINGS)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-6)
    authors = StepSettings(**{**vars(SETTINGS), "authors": True, "accumulation": 2})
    assert (step_from(folder, [[LONG], [SHORT]], authors) - together).abs().max() > 1e-4


def test_step_without_labels_changes_nothing(folder: Path) -> None:
    module = trained(folder)
    stepper = Stepper(module, SETTINGS)
    stepper.step([[LONG]])
    before = weights(module)
    result = stepper.step([[EMPTY]])
    assert math.isnan(result.losses[0])
    assert torch.equal(weights(module), before)


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    plain, recomputed = trained(folder), trained(folder)
    checkpoint_gradients(recomputed.model)
    for module in (plain, recomputed):
        module([LONG, SHORT]).backward()
    for (name, a), (_, b) in zip(
        plain.trained_parameters(), recomputed.trained_parameters(), strict=True
    ):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_missing_image_is_an_error(folder: Path) -> None:
    module = trained(folder)
    row = Row((5, module.special.image, 7), (5, IGNORED, 7))
    with pytest.raises(ValueError, match="1 <image>, but 0 images"):
        module([row])


def test_resampler_that_always_takes_part_is_trained_as_one_that_does_not(folder: Path) -> None:
    settings = replace(SETTINGS, weight_decay=0.1)
    image = TiledImage(np.full((1, 28, 28, 3), 200, np.uint8), 0, 0, (28, 28))
    results = []
    for all_parts in (False, True):
        module = trained(folder)
        module.all_parts = all_parts
        row = Row((5, module.special.image, 7), (5, IGNORED, 7), (image,))
        stepper = Stepper(module, settings)
        for batches in ([[row], [LONG]], [[LONG]], [[LONG], [row]]):  # the second has no image
            stepper.step(batches)
        results.append(weights(module))
    assert torch.equal(*results)
