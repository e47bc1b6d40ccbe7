"""Train the video demo from the image demo's weights, resuming from the last saved state."""

import json
import logging
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from scripts.demo_model.checkpoint import demo_tokenizer, write_weights
from scripts.demo_model.packing import Rows, pack
from scripts.demo_model.train import (
    LOG_STEPS,
    Meter,
    Run,
    learning_rate,
    make_optimizers,
    restore,
    save,
)
from scripts.demo_video.batches import KEPT, Batch, Batches
from scripts.demo_video.checkpoint import CONFIG, initial_model, write_folder
from scripts.demo_video.evaluation_set import VALIDATION_SEED, evaluation_set
from scripts.demo_video.frames import LabelledClip, labels, render
from scripts.demo_video.losses import MAX_FRAMES, Heads, choose_latents, compute_losses
from scripts.demo_video.stages import STAGES, Stage
from xgenmm.models.image_features import normalize
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SAVE_STEPS = 100
WARM_UP_STEPS = 30
VALIDATION_CLIPS = 64


def train(folder: Path, state: Path) -> None:
    """Run the stages; write the checkpoint to `folder` whenever the state is saved.

    state: a folder for the state of the run; training resumes from it.
    """
    torch.manual_seed(0)
    state.mkdir(parents=True, exist_ok=True)
    write_folder(folder)
    tokenizer = demo_tokenizer(folder)
    run = Run(initial_model().train(), Heads())
    if (state / "last.pt").exists():
        restore(run, state)
        logger.info("resuming stage %d of %d at step %d", run.stage + 1, len(STAGES), run.step)
    freeze(run.model)
    validation = Validation(run.model, tokenizer)
    while run.stage < len(STAGES):
        run_stage(run, STAGES[run.stage], tokenizer, validation, folder, state)


def freeze(model: XGenMM) -> None:
    """Freeze all that comes before the temporal encoder."""
    for name, parameter in model.named_parameters():
        before = "vision_encoder." in name or "vision_tokenizer.l" in name
        parameter.requires_grad_(not before)


def run_stage(
    run: Run[Heads],
    stage: Stage,
    tokenizer: Tokenizer,
    validation: "Validation",
    folder: Path,
    state: Path,
) -> None:
    """Run a stage from `run.step` to its end, logging and saving every few steps."""
    optimizers = make_optimizers(run.model, run.heads, stage.rate)
    if run.optimizer_states:
        for optimizer, content in zip(optimizers, run.optimizer_states, strict=True):
            optimizer.load_state_dict(content)
        run.optimizer_states = []
    batches = Batches(stage, tokenizer, seed=1, start=run.step)
    steps = range(run.step, stage.steps)
    loader = DataLoader(batches, batch_size=None, sampler=steps, num_workers=1, prefetch_factor=4)
    latents, width = CONFIG.resampler.num_latents, CONFIG.vision.hidden_size
    encoded = torch.empty(KEPT, stage.frames, latents, width, dtype=torch.bfloat16)
    meter = Meter()
    for step, batch in zip(steps, loader, strict=True):
        losses, right = train_step(run, stage, step, batch, encoded, optimizers)
        meter.add(len(batch.clips), losses, right)
        done = step + 1
        run.stage, run.step = (run.stage + 1, 0) if done == stage.steps else (run.stage, done)
        if done % LOG_STEPS == 0 or done == stage.steps:
            entry = meter.summary(stage.name, done, run.seconds)
            run.seconds += meter.elapsed
            run.history.append(entry)
            logger.info("%s", json.dumps(entry))
            meter = Meter()
        if done % SAVE_STEPS == 0 or done == stage.steps:
            logger.info("held out: %s", json.dumps(validation.accuracy(run.model)))
            save(run, optimizers, state)
            write_weights(run.model, folder)
            meter = Meter()


def train_step(
    run: Run[Heads],
    stage: Stage,
    step: int,
    batch: Batch,
    encoded: torch.Tensor,
    optimizers: list[torch.optim.Optimizer],
) -> tuple[dict[str, float], dict[str, list[bool]]]:
    """One step; returns the losses by name, and which answers are right by kind.

    encoded: the latents of the last `KEPT` clips, [KEPT, frames, num_latents, width]; those of the
        new clips are added.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, stage.steps, stage.rate, stage.final_rate, WARM_UP_STEPS
            )
    for number, pixels in batch.pixels.items():
        encoded[number % KEPT] = encode(run.model, pixels)
    latents = encoded[[clip.number % KEPT for clip in batch.clips]]
    backwards = torch.tensor([clip.backwards for clip in batch.clips])
    latents[backwards] = latents[backwards].flip(1)
    labels = torch.stack([clip.labels for clip in batch.clips])
    kept = choose_latents(labels, stage.empty)
    with torch.autocast("cpu", torch.bfloat16):
        losses, right = compute_losses(run.model, run.heads, latents, labels, batch.rows, kept)
    (losses["answer"] + stage.labels * losses["labels"]).backward()
    nn.utils.clip_grad_norm_([*run.model.parameters(), *run.heads.parameters()], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: loss.item() for name, loss in losses.items()}, right


@torch.no_grad()
def encode(model: XGenMM, pixels: NDArray[np.uint8]) -> torch.Tensor:
    """The latents of a clip before the temporal encoder: bfloat16 [frames, num_latents, width].

    pixels: uint8 [frames, TILE, TILE, 3].
    """
    with torch.autocast("cpu", torch.bfloat16):
        tiles = normalize(torch.from_numpy(pixels), model.config.tiling, torch.float32)
        features = model.vlm.vision_encoder(tiles)
        return model.vlm.vision_tokenizer.resample(features).bfloat16()


class Validation:
    """Held-out clips, encoded once, since what encodes them is frozen."""

    def __init__(self, model: XGenMM, tokenizer: Tokenizer) -> None:
        rng = random.Random(0)
        examples = []
        latents, all_labels = [], []
        for number, (clip, asked) in enumerate(evaluation_set(VALIDATION_SEED, VALIDATION_CLIPS)):
            shown = LabelledClip(number, False, labels(clip, MAX_FRAMES))
            examples.append(([shown], asked))
            latents.append(encode(model, render(clip, MAX_FRAMES, rng)))
            all_labels.append(shown.labels)
        self.rows: Rows = pack(tokenizer, examples)
        self.latents, self.labels = torch.stack(latents), torch.stack(all_labels)

    @torch.no_grad()
    def accuracy(self, model: XGenMM) -> dict[str, str]:
        """The share of right answers by kind, and, after the slash, with the frames reversed."""
        found: dict[str, list[str]] = defaultdict(list)
        kept = torch.ones(VALIDATION_CLIPS, CONFIG.resampler.num_latents, dtype=torch.bool)
        for latents in (self.latents, self.latents.flip(1)):
            with torch.autocast("cpu", torch.bfloat16):
                _, right = compute_losses(model, Heads(), latents, self.labels, self.rows, kept)
            for kind, values in right.items():
                found[kind].append(f"{sum(values) / len(values):.2f}")
        return {kind: "/".join(shares) for kind, shares in sorted(found.items())}
