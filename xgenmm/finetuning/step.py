"""The optimizer step: losses and gradients of several batches -> new weights and rate.

Two modes. `authors` repeats the loop of the published code (`finetune_one_epoch`), to be comparable
with it. The default differs only where that loop is at fault:

* The authors clip the gradient after every batch, also between the accumulated batches of one step,
  so that early batches lose weight. The default clips once, before the step.
* The authors average the batches' means, over accumulated batches and over devices, so that a label
  in a batch of few labels weighs more. The default takes the mean over all labels of the step.
* The authors divide an incomplete last group by the full number of batches, and so shrink it.
* A batch without labels has the loss NaN there, and a step without labels still moves the weights
  by their momentum. The default skips such a step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from xgenmm.finetuning import sharding
from xgenmm.finetuning.batch import Row, count_labels, has_images
from xgenmm.finetuning.module import TrainedModel

Batch = Sequence[Row]


@dataclass(frozen=True)
class StepSettings:
    """Settings of the optimizer.

    Attributes:
        accumulation: batches of a step.
        warmup_steps: steps until the rate is `learning_rate`; the first step has the rate 0.
        total_steps: at the end of which a decaying schedule has reached 0.
        schedule: one of transformers' names, such as `cosine`, `linear` or `constant_with_warmup`.
        max_norm: the gradient is scaled down to this L2 norm if it is larger.
        authors: follow the authors' loop exactly, faults included.
    """

    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    accumulation: int = 1
    warmup_steps: int = 2000
    total_steps: int = 12_759
    schedule: str = "cosine"
    max_norm: float = 1.0
    authors: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step measured.

    Attributes:
        losses: of each batch, the mean over its labels; NaN without labels.
        labels: of each batch.
        norms: of the gradient, each time before it was clipped.
        rate: learning rate that the step was made with.
    """

    losses: list[float]
    labels: list[int]
    norms: list[float]
    rate: float


def make_optimizer(module: TrainedModel, settings: StepSettings) -> tuple[AdamW, LambdaLR]:
    """Build AdamW over all trained parameters, in one group, and its schedule."""
    parameters = [parameter for _, parameter in module.trained_parameters()]
    optimizer = AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, eps=1e-8
    )
    schedule: LambdaLR = get_scheduler(
        settings.schedule, optimizer, settings.warmup_steps, settings.total_steps
    )
    return optimizer, schedule


class Stepper:
    """Makes optimizer steps.

    Args:
        forward: what computes a batch's summed loss: the module, or a wrapper of it (DDP).
        sum_over_devices: adds up a number over all processes.
        devices: number of processes; wrappers average the gradients over them.
        unsynchronized: a context in which they do so later, with the gradients of the next batch.
    """

    def __init__(
        self,
        module: TrainedModel,
        settings: StepSettings,
        *,
        forward: Callable[[Batch], torch.Tensor] | None = None,
        sum_over_devices: Callable[[int], int] = int,
        devices: int = 1,
        unsynchronized: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.module, self.settings = module, settings
        self.optimizer, self.schedule = make_optimizer(module, settings)
        self._forward = forward or module
        self._sum_over_devices, self._devices = sum_over_devices, devices
        self._unsynchronized = unsynchronized

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """Make one step from at most `accumulation` batches."""
        labels = [count_labels(batch, self.module.special) for batch in batches]
        total = self._sum_over_devices(sum(labels))
        losses, norms = list[float](), list[float]()
        for number, (batch, count) in enumerate(zip(batches, labels, strict=True), 1):
            with ExitStack() as contexts:
                contexts.enter_context(self._attention())
                if number < len(batches) and not self.settings.authors:
                    contexts.enter_context(self._unsynchronized())
                loss = self._forward(batch)
                losses.append(loss.item() / count if count else math.nan)
                (loss / self._divisor(count, total)).backward()
            if self.settings.authors:
                norms.append(self._clip())
        if not self.settings.authors:
            norms.append(self._clip())
        self._drop_unused_gradients(batches)
        rate = float(self.schedule.get_last_lr()[0])
        if total or self.settings.authors:
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(losses, labels, norms, rate)

    def _attention(self) -> AbstractContextManager[None]:
        """The authors' attention is a product, a softmax and a product, which rounds otherwise.

        In float32 that alone moves a weight near 1 by its last bit.
        """
        return sdpa_kernel(SDPBackend.MATH) if self.settings.authors else nullcontext()

    def _divisor(self, labels: int, total: int) -> float:
        """What the summed loss of a batch is divided by; no labels give gradients of 0."""
        if self.settings.authors:
            return max(labels, 1) * self.settings.accumulation
        return max(total, 1) / self._devices

    def _clip(self) -> float:
        parameters = [parameter for _, parameter in self.module.trained_parameters()]
        return sharding.number(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_norm))

    def _drop_unused_gradients(self, batches: Sequence[Batch]) -> None:
        """Leave the resampler without in a step without images, also where it took part in it."""
        if self.module.all_parts:
            images = sum(has_images(batch, self.module.special) for batch in batches)
            if not self._sum_over_devices(images):
                self.module.drop_resampler_gradients()

    def moments(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's tensors, named `PARAMETER/KEY`."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.module.trained_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    def counters(self) -> dict[str, Any]:
        """Return the rest of the state of optimizer and schedule, as JSON has it."""
        groups = self.optimizer.state_dict()["param_groups"]
        return {"groups": groups, "schedule": self.schedule.state_dict()}

    def load(self, moments: Mapping[str, torch.Tensor], counters: Mapping[str, Any]) -> None:
        """Continue from what `moments` (whole tensors) and `counters` returned."""
        parameters = dict(self.module.trained_parameters())
        indices = {name: index for index, name in enumerate(parameters)}
        state = dict[int, dict[str, torch.Tensor]]()
        for name_and_key, value in moments.items():
            name, _, key = name_and_key.rpartition("/")
            state.setdefault(indices[name], {})[key] = sharding.like(parameters[name], value)
        self.optimizer.load_state_dict({"state": state, "param_groups": counters["groups"]})
        self.schedule.load_state_dict(counters["schedule"])
