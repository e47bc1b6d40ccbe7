"""Train the demo checkpoint from scratch, resuming from the last saved state."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from scripts.demo_model.batches import Batch, Batches, load_batches
from scripts.demo_model.checkpoint import CONFIG, demo_tokenizer, write_folder, write_weights
from scripts.demo_model.fonts import training_fonts
from scripts.demo_model.losses import Heads, compute_losses
from scripts.demo_model.stages import LOSS_WEIGHTS, Stage
from xgenmm.models.xgenmm import XGenMM

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 100
LOG_STEPS = 20
SAVE_STEPS = 100


HeadsT = TypeVar("HeadsT", bound=nn.Module)


@dataclass
class Run(Generic[HeadsT]):
    """A training run: what is trained, and how far it is.

    stage, step: the next step. seconds: training time so far. optimizer_states: of the saved
    state, until the stage that they belong to goes on.
    """

    model: XGenMM
    heads: HeadsT
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    optimizer_states: list[dict[str, Any]] = field(default_factory=list)


def train(folder: Path, state: Path, stages: Sequence[Stage]) -> None:
    """Run the stages and write the checkpoint to `folder`.

    state: a folder for the state of the run; training resumes from it.
    """
    torch.manual_seed(0)
    state.mkdir(parents=True, exist_ok=True)
    write_folder(folder)
    tokenizer = demo_tokenizer(folder)
    fonts = training_fonts()
    logger.info("%d fonts to train on", len(fonts))
    run = Run(XGenMM(CONFIG).train(), Heads())
    initialize(run.model)
    if (state / "last.pt").exists():
        restore(run, state)
        logger.info("resuming stage %d of %d at step %d", run.stage + 1, len(stages), run.step)
    while run.stage < len(stages):
        stage = stages[run.stage]
        run_stage(run, stage, Batches(stage, fonts, tokenizer, seed=1), state)
    write_weights(run.model, folder)


def initialize(model: XGenMM) -> None:
    """Initialize embeddings and latents small; PyTorch's defaults suit the rest."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or name.endswith("latents"):
            nn.init.normal_(parameter, std=0.1)


def run_stage(run: Run[Heads], stage: Stage, batches: Batches, state: Path) -> None:
    """Run a stage from `run.step` to its end, logging and saving every few steps."""
    optimizers = make_optimizers(run.model, run.heads, stage.rate)
    if run.optimizer_states:
        for optimizer, content in zip(optimizers, run.optimizer_states, strict=True):
            optimizer.load_state_dict(content)
        run.optimizer_states = []
    meter = Meter()
    for step, batch in enumerate(load_batches(batches, range(run.step, stage.steps)), run.step):
        losses, right = train_step(run, stage, step, batch, optimizers)
        meter.add(len(batch[0]), losses, right)
        done = step + 1
        if done % LOG_STEPS == 0 or done == stage.steps:
            entry = meter.summary(stage.name, done, run.seconds)
            run.seconds += meter.elapsed
            run.history.append(entry)
            logger.info("%s", json.dumps(entry))
            meter = Meter()
        if done == stage.steps:
            run.stage, run.step = run.stage + 1, 0
        else:
            run.step = done
        if done % SAVE_STEPS == 0 or done == stage.steps:
            save(run, optimizers, state)


def train_step(
    run: Run[Heads],
    stage: Stage,
    step: int,
    batch: Batch,
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[dict[str, float], dict[str, list[bool]]]:
    """One step; returns the losses by name, and which answers are right by kind."""
    weights = LOSS_WEIGHTS[stage.name]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, stage.rate, stage.final_rate)
    with torch.autocast("cpu", torch.bfloat16):
        losses, right = compute_losses(run.model, run.heads, weights, *batch)
    torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
    nn.utils.clip_grad_norm_([*run.model.parameters(), *run.heads.parameters()], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: loss.item() for name, loss in losses.items()}, right


def learning_rate(
    step: int, steps: int, rate: float, final_rate: float, warm_up_steps: int = WARM_UP_STEPS
) -> float:
    """Linear warm-up, and linear decay over the `steps` of a stage."""
    warm_up = min(1.0, (step + 1) / warm_up_steps)
    return warm_up * (rate + (final_rate - rate) * step / steps)


def make_optimizers(model: XGenMM, heads: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which need fewer steps with it; AdamW for the rest.

    Muon's updates are scaled to those of AdamW (arXiv 2502.16982, section 2.2), so that one
    learning rate suits both.
    """
    matrices: list[nn.Parameter] = []
    others = list(heads.parameters())
    for name, parameter in model.named_parameters():
        hidden = "layers." in name and parameter.ndim == 2
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


class Meter:
    """Means of losses and accuracies since it was made, and the time they took."""

    def __init__(self) -> None:
        self.images = 0
        self.losses: dict[str, list[float]] = defaultdict(list)
        self.right: dict[str, list[bool]] = defaultdict(list)
        self.elapsed = 0.0
        self._started = time.monotonic()

    def add(
        self, images: int, losses: Mapping[str, float], right: Mapping[str, Sequence[bool]]
    ) -> None:
        """Add the results of a step."""
        self.images += images
        for name, loss in losses.items():
            self.losses[name].append(loss)
        for kind, values in right.items():
            self.right[kind] += values
        self.elapsed = time.monotonic() - self._started

    def summary(self, stage: str, step: int, seconds: float) -> dict[str, Any]:
        """An entry of the history; `seconds` is the training time before this meter."""
        return {
            "stage": stage,
            "step": step,
            "seconds": round(seconds + self.elapsed, 1),
            "images_a_second": round(self.images / self.elapsed, 1),
            "loss": {name: round(sum(v) / len(v), 4) for name, v in self.losses.items()},
            "right": {kind: round(sum(v) / len(v), 3) for kind, v in sorted(self.right.items())},
        }


def save(run: Run[Any], optimizers: Sequence[torch.optim.Optimizer], state: Path) -> None:
    """Replace the saved state and the history, each atomically."""
    (state / "history.tmp").write_text(json.dumps(run.history))
    (state / "history.tmp").replace(state / "history.json")
    content = {
        "model": run.model.state_dict(),
        "heads": run.heads.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "stage": run.stage,
        "step": run.step,
        "seconds": run.seconds,
    }
    torch.save(content, state / "last.tmp")
    (state / "last.tmp").replace(state / "last.pt")


def restore(run: Run[Any], state: Path) -> None:
    """Read what `save` wrote."""
    saved = torch.load(state / "last.pt", weights_only=True)
    run.model.load_state_dict(saved["model"])
    run.heads.load_state_dict(saved["heads"])
    run.stage, run.step, run.seconds = saved["stage"], saved["step"], saved["seconds"]
    run.history = json.loads((state / "history.json").read_text())
    # Each stage starts with fresh optimizers.
    run.optimizer_states = saved["optimizers"] if run.step else []
