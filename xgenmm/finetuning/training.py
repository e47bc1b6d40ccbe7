"""The training loop: samples in, an adapter or a checkpoint out; resumes after a kill."""

import dataclasses
import logging
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.staging import disk_errors
from xgenmm.finetuning.adapters import (
    TrainingTarget,
    count_parameters,
    save_adapter,
    select_parameters,
    trained_tensors,
)
from xgenmm.finetuning.batch import count_labels
from xgenmm.finetuning.checkpoint import TrainedCheckpoint
from xgenmm.finetuning.conversation import special_ids
from xgenmm.finetuning.dataset import PlacedSample
from xgenmm.finetuning.devices import Devices
from xgenmm.finetuning.display import Progress
from xgenmm.finetuning.loader import Plan, RowReader, read_steps
from xgenmm.finetuning.merge import write_checkpoint
from xgenmm.finetuning.module import TrainedModel, checkpoint_gradients
from xgenmm.finetuning.plots import Writer, draw_losses, tensorboard_writer
from xgenmm.finetuning.progress import RunFolder, complete_folder
from xgenmm.finetuning.sharding import gather
from xgenmm.finetuning.step import Batch, Stepper, StepResult, StepSettings
from xgenmm.models.vision import fuse_attention
from xgenmm.models.xgenmm import XGenMM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that the result depends on, apart from the data.

    Attributes:
        batch_size: samples of a step, over all devices and accumulated batches.
        micro_batch_size: samples that a device computes at once.
        warmup: share of the steps in which the rate rises.
        validation: share of the samples that are not trained on, but measured.
        save_every: steps between saved states and validations.
        precision: `float32` or `bf16`, of matrix products and of weights that are not trained.
    """

    target: TrainingTarget = field(default_factory=TrainingTarget)
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.03
    epochs: int = 1
    batch_size: int = 16
    micro_batch_size: int = 1
    max_tokens: int = 2048
    validation: float = 0.05
    save_every: int = 100
    seed: int = 42
    gradient_checkpointing: bool = True
    authors: bool = False
    precision: str = "float32"


class Training:
    """One run of training on this process's device, and on those of other processes beside it."""

    def __init__(
        self,
        checkpoint: TrainedCheckpoint,
        reader: RowReader,
        samples: Sequence[PlacedSample],
        settings: TrainingSettings,
        output: Path,
        *,
        sharded: bool = False,
    ) -> None:
        """Load the model.

        sharded: split the model over the devices, instead of a copy on each.

        Raises InputError if peft or accelerate is not installed.
        """
        self._checkpoint, self._reader, self._settings = checkpoint, reader, settings
        self._devices = Devices(sharded=sharded)
        self._output = RunFolder(output)
        self._validation, self._samples = split(samples, settings.validation, settings.seed)
        self._plan = Plan(
            len(self._samples), settings.batch_size, settings.micro_batch_size, settings.epochs,
            settings.seed,
        )  # fmt: skip
        device, bf16 = self._devices.device, settings.precision == "bf16"
        torch.manual_seed(settings.seed)
        model = load_model(checkpoint, device, settings)
        self._adapter = select_parameters(model, settings.target)
        if settings.gradient_checkpointing:
            checkpoint_gradients(model)
        special = special_ids(checkpoint.tokenizer)
        self._module = TrainedModel(model, special, autocast=bf16)
        self._stepper = Stepper(
            self._module,
            self._step_settings(),
            forward=self._devices.wrap(self._module),
            sum_over_devices=lambda number: int(self._devices.sum([number])[0]),
            devices=self._devices.count,
            unsynchronized=self._devices.unsynchronized,
        )

    def _step_settings(self) -> StepSettings:
        settings, steps = self._settings, self._plan.steps
        return StepSettings(
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            accumulation=math.ceil(
                settings.batch_size / (settings.micro_batch_size * self._devices.count)
            ),
            warmup_steps=round(settings.warmup * steps),
            total_steps=steps,
            schedule=settings.schedule,
            authors=settings.authors,
        )

    def run(self) -> Path:
        """Train, from the newest saved state on if there is one; return the folder of the result.

        Raises InputError if the output folder has another run or an image cannot be read any more,
        and CheckpointError if the disk is full; what was saved before stays.
        """
        with disk_errors(self._output.path):
            best = self._train()
            self._write_result(best)
        self._devices.wait()
        self._devices.leave()
        return self._output.path / self._result_name

    def _train(self) -> float | None:
        """Make all steps that are left; return the lowest validation loss."""
        devices, main = self._devices, self._devices.is_main
        if main:
            trained = {**dataclasses.asdict(self._settings), "samples": len(self._samples)}
            self._output.open({**trained, "checkpoint": self._checkpoint.folder.name})
        devices.wait()
        first, extra = self._output.load(self._module, self._stepper)
        best: float | None = extra["best"] if extra else None
        if main:
            self._output.truncate_log(first)
        numbers = [p for _, p in self._module.trained_parameters()]
        split_over = f", split over {devices.count} devices" if devices.sharded else ""
        logger.info(
            "training %d parameters%s, from step %d", count_parameters(numbers), split_over, first
        )
        steps = read_steps(
            self._plan, self._samples, self._reader, first, devices.index, devices.count
        )
        with (
            tensorboard_writer(self._output.path, first, enabled=main) as writer,
            Progress(self._plan.steps, "step", initial=first, shown=main) as progress,
        ):
            for step, batches in steps:
                line = self._step(step, batches)
                progress.update(loss=f"{line['loss']:.4f}", rate=f"{line['rate']:.1e}")
                self._log(line, writer)
                done = step + 1
                if done % self._settings.save_every == 0 or done == self._plan.steps:
                    best = self._validate_and_save(done, best, writer)
        return best

    @property
    def _result_name(self) -> str:
        alone = self._adapter is not None and not self._checkpoint.files
        return "adapter" if alone else "checkpoint"

    def _step(self, step: int, batches: Sequence[Batch]) -> dict[str, Any]:
        started = time.monotonic()
        result = self._stepper.step(batches)
        loss, labels = self._devices.sum([_summed_loss(result), sum(result.labels)])
        line = {
            "step": step + 1,
            "epoch": step // self._plan.steps_per_epoch + 1,
            "loss": loss / labels if labels else math.nan,
            "rate": result.rate,
            "norm": result.norms[-1],
            "labels": int(labels),
            "seconds": round(time.monotonic() - started, 3),
        }
        device = self._devices.device
        if device.type == "cuda":
            line["gigabytes"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        return line

    def _validate_and_save(self, step: int, best: float | None, writer: Writer) -> float | None:
        """Measure the validation loss, keep the weights if it is the lowest, and save the state."""
        loss = self._validation_loss() if self._validation else None
        if loss is not None:
            self._log({"step": step, "validation_loss": loss}, writer)
            if not math.isnan(loss) and (best is None or loss < best):
                best = loss
                self._keep_weights()
        main = self._devices.is_main
        self._output.save(step, self._module, self._stepper, {"best": best}, writes=main)
        self._devices.wait()
        return best

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """The mean loss of all labels of the validation samples."""
        total, labels = 0.0, 0
        devices, device = self._devices.count, self._devices.index
        for start in range(0, len(self._validation), devices):
            number = start + device
            if number < len(self._validation):
                rows = [self._reader.read(self._validation[number])]
                total += self._module(rows).item()
                labels += count_labels(rows, self._module.special)
            elif self._devices.sharded:  # the others wait for this device's shards
                self._module([self._reader.read(self._validation[0])])
        total, count = self._devices.sum([total, labels])
        return total / count if count else math.nan

    def _keep_weights(self) -> None:
        """Keep the trained parameters as the best so far, in an adapter's files.

        Matrix products round them to `precision`, so those of LoRA are kept in that.
        """
        main, base = self._devices.is_main, self._checkpoint.folder
        tensors = gather(trained_tensors(self._module), keep=main)
        if self._adapter is not None and self._settings.precision == "bf16":
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        if main:
            with complete_folder(self._output.best) as folder:
                save_adapter(folder, tensors, self._adapter or {}, base)

    def _write_result(self, best: float | None) -> None:
        """Write the adapter, or the whole checkpoint, from the best weights or the last."""
        if best is None:
            self._keep_weights()
        if not self._devices.is_main:
            return
        draw_losses(self._output.read_log(), self._output.path / "loss.png")
        target = self._output.path / self._result_name
        if target.name == "adapter":
            with complete_folder(target) as folder:
                for file in self._output.best.iterdir():
                    shutil.copyfile(file, folder / file.name)
        else:
            base, files = self._checkpoint.folder, self._checkpoint.files
            write_checkpoint(base, self._output.best, target, files)

    def _log(self, line: dict[str, Any], writer: Writer) -> None:
        if self._devices.is_main:
            self._output.log(line)
            for key in line.keys() & {"loss", "rate", "norm", "validation_loss"}:
                writer(key, line[key], line["step"])


def _summed_loss(result: StepResult) -> float:
    pairs = zip(result.losses, result.labels, strict=True)
    return sum(loss * labels for loss, labels in pairs if labels)


def load_model(
    checkpoint: TrainedCheckpoint, device: torch.device, settings: TrainingSettings
) -> XGenMM:
    """Load a checkpoint for training.

    What is not trained is in bfloat16 if products are; what is trained is in float32.
    """
    whole = settings.target.full or settings.precision == "float32"
    with torch.device("meta"):
        model = XGenMM(checkpoint.config)
    dtype = torch.float32 if whole else torch.bfloat16
    load_parameters(model, checkpoint.folder, device=device, dtype=dtype)
    fuse_attention(model.vlm.vision_encoder)
    return model


def split(
    samples: Sequence[PlacedSample], share: float, seed: int
) -> tuple[list[PlacedSample], list[PlacedSample]]:
    """Return the samples to validate with, chosen at random, and those to train on.

    Samples that a mix repeats are all on one side.
    """
    places = sorted({(str(placed.place.file), placed.place.line) for placed in samples})
    chosen = set(random.Random(seed).sample(places, int(share * len(places))))
    held_out, trained = dict[tuple[str, int], PlacedSample](), list[PlacedSample]()
    for placed in samples:
        key = str(placed.place.file), placed.place.line
        if key in chosen:
            held_out[key] = placed
        else:
            trained.append(placed)
    return list(held_out.values()), trained
