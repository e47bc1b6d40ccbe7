"""The options of `xgenmm finetune` -> the settings of a run."""

import argparse
from pathlib import Path

import torch

from xgenmm.errors import InputError
from xgenmm.finetuning.adapters import LORA_TARGETS, TrainingTarget
from xgenmm.finetuning.conversation import MAX_TEXT_TOKENS
from xgenmm.finetuning.samples import MAX_IMAGES
from xgenmm.finetuning.training import TrainingSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xgenmm finetune`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a name or folder to start from")
    parser.add_argument("data", type=Path, metavar="DATA", help="the samples")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", type=Path, metavar="OUTPUT", help="folder of the run")
    where.add_argument("--check", action="store_true", help="only check DATA and show what it has")
    parser.add_argument(
        "--untrusted",
        action="store_true",
        help="DATA is a stranger's: refuse images by URL from addresses that are not public, and "
        "files outside of DATA's folder",
    )
    add = _Adder(parser).add
    add("--max-tokens", MAX_TEXT_TOKENS, "cut texts after N tokens, images not counted")
    add("--max-images", MAX_IMAGES, "refuse samples of more images")
    add("--validation", 0.05, "share of the samples to measure the loss with, not to train on")
    add("--seed", 42, "of everything random")
    parser.add_argument(
        "--full", action="store_true", help="train all but the vision tower, as the authors do"
    )
    add("--lora-rank", 16, "width of LoRA's matrices")
    add("--lora-alpha", 32, "scale of LoRA, divided by its rank")
    parser.add_argument(
        "--lora-targets",
        nargs="+",
        default=LORA_TARGETS,
        metavar="NAME",
        help=f"layers of the decoder that get LoRA (default: {' '.join(LORA_TARGETS)})",
    )
    parser.add_argument(
        "--resampler",
        choices=("whole", "lora", "frozen"),
        default="whole",
        help="how the resampler is trained beside LoRA (default: %(default)s)",
    )
    add("--learning-rate", None, "highest rate (default: 1e-4, with --full 2e-5)")
    add("--weight-decay", 0.0, "of all that is trained")
    parser.add_argument(
        "--schedule",
        choices=("cosine", "linear", "constant", "constant_with_warmup"),
        default="cosine",
        help="how the rate falls after the warm-up (default: %(default)s)",
    )
    add("--warmup", 0.03, "share of the steps in which the rate rises")
    add("--epochs", 1, "how often each sample is seen")
    add("--batch-size", 16, "samples of a step, over all devices")
    add("--micro-batch-size", 1, "samples that a device computes at once")
    add("--save-every", 100, "steps between saved states and validations")
    parser.add_argument(
        "--no-gradient-checkpointing",
        action="store_true",
        help="keep all activations: faster, but needs much more memory",
    )
    parser.add_argument(
        "--precision",
        choices=("bf16", "float32"),
        help="of matrix products, and of weights that are not trained (default: bf16 on a GPU)",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="split the model over the devices (FSDP2) where one cannot hold it",
    )
    parser.add_argument(
        "--authors",
        action="store_true",
        help="follow the authors' loop exactly: clip after every batch, and take the mean of the "
        "batches' means (by default: clip once a step, mean over all labels of a step)",
    )


class _Adder:
    """Adds options of a number each."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def add(self, name: str, default: float | None, text: str) -> None:
        """Add one; it is an integer if its default is."""
        explained = text if default is None else f"{text} (default: %(default)s)"
        kind = int if isinstance(default, int) else float
        self._parser.add_argument(name, type=kind, default=default, help=explained, metavar="N")


def training_settings(options: argparse.Namespace) -> TrainingSettings:
    """Return the settings of a run. Raises InputError that names the option out of range."""
    for name in (
        "max_tokens",
        "max_images",
        "lora_rank",
        "lora_alpha",
        "epochs",
        "batch_size",
        "micro_batch_size",
        "save_every",
    ):
        if getattr(options, name) < 1:
            raise InputError(name.replace("_", "-"), "must be at least 1")
    for name in ("validation", "warmup"):
        if not 0 <= getattr(options, name) < 1:
            raise InputError(name, "must be at least 0 and below 1")
    rate = options.learning_rate
    if rate is None:
        rate = 2e-5 if options.full else 1e-4
    if not 0 < rate < 1:
        raise InputError("learning-rate", "must be above 0 and below 1")
    target = TrainingTarget(
        options.full,
        options.lora_rank,
        options.lora_alpha,
        tuple(options.lora_targets),
        options.resampler,
    )
    automatic = "bf16" if torch.cuda.is_available() else "float32"
    same = (
        "weight_decay",
        "schedule",
        "warmup",
        "epochs",
        "batch_size",
        "micro_batch_size",
        "max_tokens",
        "validation",
        "save_every",
        "seed",
        "authors",
    )
    return TrainingSettings(
        target=target,
        learning_rate=rate,
        gradient_checkpointing=not options.no_gradient_checkpointing,
        precision=options.precision or automatic,
        **{name: getattr(options, name) for name in same},
    )
