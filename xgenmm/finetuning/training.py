"""The training loop: samples in, an adapter or a checkpoint out; resumes after a kill."""

import dataclasses
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from xgenmm.checkpoints.loading import load_parameters
from xgenmm.config import XGenMMConfig
from xgenmm.errors import InputError
from xgenmm.finetuning.adapters import (
    TrainingTarget,
    count_parameters,
    save_adapter,
    select_parameters,
    trained_tensors,
)
from xgenmm.finetuning.batch import count_labels
from xgenmm.finetuning.conversation import special_ids
from xgenmm.finetuning.dataset import PlacedSample
from xgenmm.finetuning.loader import Plan, RowReader, read_steps
from xgenmm.finetuning.merge import write_checkpoint
from xgenmm.finetuning.module import TrainedModel, checkpoint_gradients
from xgenmm.finetuning.plots import draw_losses, tensorboard_writer
from xgenmm.finetuning.progress import RunFolder, complete_folder
from xgenmm.finetuning.step import Batch, Stepper, StepResult, StepSettings
from xgenmm.models.vision import fuse_attention
from xgenmm.models.xgenmm import XGenMM

if TYPE_CHECKING:
    from accelerate import Accelerator

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


class Training:
    """One run of training on this process's device, and on those of other processes beside it."""

    def __init__(
        self,
        checkpoint: Path,
        reader: RowReader,
        samples: Sequence[PlacedSample],
        settings: TrainingSettings,
        output: Path,
    ) -> None:
        """Load the model. Raises InputError if peft or accelerate is not installed."""
        self._checkpoint, self._reader, self._settings = checkpoint, reader, settings
        self._accelerator = _accelerator()
        self._output = RunFolder(output)
        self._validation, self._samples = split(samples, settings.validation, settings.seed)
        self._plan = Plan(
            len(self._samples), settings.batch_size, settings.micro_batch_size, settings.epochs,
            settings.seed,
        )  # fmt: skip
        torch.manual_seed(settings.seed)
        model = load_model(reader.config, checkpoint, self._accelerator.device, settings.target)
        self._adapter = select_parameters(model, settings.target)
        if settings.gradient_checkpointing:
            checkpoint_gradients(model)
        self._module = TrainedModel(model, special_ids(reader.tokenizer))
        self._forward = self._accelerator.prepare(self._module)
        self._stepper = Stepper(
            self._module,
            self._step_settings(),
            forward=self._forward,
            sum_over_devices=lambda number: int(self._sum([number])[0]),
            devices=self._accelerator.num_processes,
        )

    def _step_settings(self) -> StepSettings:
        settings, steps = self._settings, self._plan.steps
        return StepSettings(
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            accumulation=math.ceil(
                settings.batch_size / (settings.micro_batch_size * self._accelerator.num_processes)
            ),
            warmup_steps=round(settings.warmup * steps),
            total_steps=steps,
            schedule=settings.schedule,
            authors=settings.authors,
        )

    def run(self) -> Path:
        """Train, from the newest saved state on if there is one; return the folder of the result.

        Raises InputError if the output folder has another run, and CheckpointError if the disk is
        full; what was saved before stays.
        """
        main = self._accelerator.is_main_process
        if main:
            trained = {**dataclasses.asdict(self._settings), "samples": len(self._samples)}
            self._output.open({**trained, "checkpoint": self._checkpoint.name})
        self._accelerator.wait_for_everyone()
        first, extra = self._output.load(self._module, self._stepper)
        best = extra["best"] if extra else None
        if main:
            self._output.truncate_log(first)
        numbers = [p for _, p in self._module.trained_parameters()]
        logger.info("training %d parameters, from step %d", count_parameters(numbers), first)
        devices, device = self._accelerator.num_processes, self._accelerator.process_index
        steps = read_steps(self._plan, self._samples, self._reader, first, device, devices)
        writer = tensorboard_writer(self._output.path) if main else None
        with tqdm(total=self._plan.steps, initial=first, disable=not main, unit="step") as bar:
            for step, batches in steps:
                line = self._step(step, batches)
                bar.set_postfix(loss=f"{line['loss']:.4f}", rate=f"{line['rate']:.1e}")
                bar.update()
                self._log(line, writer)
                done = step + 1
                if done % self._settings.save_every == 0 or done == self._plan.steps:
                    best = self._validate_and_save(done, best, writer)
        if main:
            draw_losses(self._output.read_log(), self._output.path / "loss.png")
            self._write_result("best" if best is not None else None)
        self._accelerator.wait_for_everyone()
        self._accelerator.end_training()
        return self._output.path / self._result_name

    @property
    def _result_name(self) -> str:
        return "adapter" if self._adapter is not None else "checkpoint"

    def _step(self, step: int, batches: Sequence[Batch]) -> dict[str, Any]:
        started = time.monotonic()
        result = self._stepper.step(batches)
        loss, labels = self._sum([_summed_loss(result), sum(result.labels)])
        return {
            "step": step + 1,
            "epoch": step // self._plan.steps_per_epoch + 1,
            "loss": loss / labels if labels else math.nan,
            "rate": result.rate,
            "norm": result.norms[-1],
            "labels": int(labels),
            "seconds": round(time.monotonic() - started, 3),
        }

    def _validate_and_save(self, step: int, best: float | None, writer: Any) -> float | None:
        """Measure the validation loss, keep the weights if it is the lowest, and save the state."""
        loss = self._validation_loss() if self._validation else None
        main = self._accelerator.is_main_process
        if loss is not None:
            self._log({"step": step, "validation_loss": loss}, writer)
            if best is None or loss < best:
                best = loss
                if main:
                    self._write_weights("best")
        if main:
            self._output.save(step, self._module, self._stepper, {"best": best})
        self._accelerator.wait_for_everyone()
        return best

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """The mean loss of all labels of the validation samples."""
        total, labels = 0.0, 0
        devices, device = self._accelerator.num_processes, self._accelerator.process_index
        for placed in self._validation[device::devices]:
            rows = [self._reader.read(placed)]
            total += self._module(rows).item()
            labels += count_labels(rows, self._module.special)
        total, count = self._sum([total, labels])
        return total / count if count else math.nan

    def _write_weights(self, name: str) -> None:
        with complete_folder(self._output.path / name) as folder:
            save_adapter(
                folder, trained_tensors(self._module), self._adapter or {}, self._checkpoint
            )

    def _write_result(self, best: str | None) -> None:
        """Write the adapter, or the whole checkpoint, from the best weights or the last."""
        if best is None:
            self._write_weights("best")
        if self._adapter is not None:
            with complete_folder(self._output.path / "adapter") as folder:
                for file in (self._output.path / "best").iterdir():
                    (folder / file.name).write_bytes(file.read_bytes())
        else:
            adapter = self._output.path / "best"
            write_checkpoint(self._checkpoint, adapter, self._output.path / "checkpoint")

    def _log(self, line: dict[str, Any], writer: Any) -> None:
        if not self._accelerator.is_main_process:
            return
        self._output.log(line)
        if writer is not None:
            for key in line.keys() & {"loss", "rate", "norm", "validation_loss"}:
                writer.add_scalar(key, line[key], line["step"])

    def _sum(self, numbers: Sequence[float]) -> list[float]:
        """Add up numbers over all devices."""
        dtype = torch.float32 if self._accelerator.device.type == "mps" else torch.float64
        values = torch.tensor(numbers, dtype=dtype, device=self._accelerator.device)
        total: list[float] = self._accelerator.reduce(values, "sum").tolist()
        return total


def _summed_loss(result: StepResult) -> float:
    pairs = zip(result.losses, result.labels, strict=True)
    return sum(loss * labels for loss, labels in pairs if labels)


def _accelerator() -> "Accelerator":
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        problem = "needs accelerate; run `pip install 'xgenmm[finetune]'`"
        raise InputError("finetune", problem) from error
    # A step of text only leaves the resampler without a gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    gpu = torch.cuda.is_available()
    return Accelerator(
        cpu=not gpu,  # without which processes on CPUs would not know of one another
        mixed_precision="bf16" if gpu else "no",
        kwargs_handlers=[unused],
    )


def load_model(
    config: XGenMMConfig, folder: Path, device: torch.device, target: TrainingTarget
) -> XGenMM:
    """Load a checkpoint for training: in bfloat16 on a GPU, but in float32 what is all trained."""
    dtype = torch.float32 if target.full or device.type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = XGenMM(config)
    load_parameters(model, folder, device=device, dtype=dtype)
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
