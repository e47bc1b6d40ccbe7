"""The command `xgenmm finetune`."""

import argparse
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from xgenmm.checkpoints.checks import read_tokenizer
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.config import XGenMMConfig
from xgenmm.errors import CheckpointError, InputError
from xgenmm.finetuning.adapters import LORA_TARGETS, TrainingTarget
from xgenmm.finetuning.check import Report, check_dataset, describe
from xgenmm.finetuning.conversation import MAX_TEXT_TOKENS, PAD
from xgenmm.finetuning.dataset import Dataset, read_dataset
from xgenmm.finetuning.images import ImageReader
from xgenmm.finetuning.loader import RowReader
from xgenmm.finetuning.merge import write_checkpoint
from xgenmm.finetuning.samples import MAX_IMAGES
from xgenmm.finetuning.training import Training, TrainingSettings
from xgenmm.preprocessing.fetch import FetchLimits
from xgenmm.preprocessing.tokenizer import Tokenizer

DOWNLOADS = "downloads"
DESCRIPTION = """\
Train a checkpoint on your own images and answers.

    xgenmm finetune demo data.jsonl --check
    xgenmm finetune demo data.jsonl -o OUTPUT

OUTPUT gets the adapter (`adapter`; with --full a whole `checkpoint`), `log.jsonl` and a plot of the
losses. The same command continues a run that was killed. On several GPUs, run it as
`accelerate launch --multi_gpu -m xgenmm finetune ...`.

DATA is a file, a folder of files, or a mix (.yaml, `data_path: {a.jsonl: 1000, b.json: null}`). A
.jsonl file has one sample a line, a .json file a list of samples, each in one of two formats:

    {"messages": [{"role": "user", "content": "<image>What is it?"},
                  {"role": "assistant", "content": "A mill."}], "images": ["mill.jpg"]}
    {"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                       {"from": "gpt", "value": "A mill."}], "image": "mill.jpg"}

Paths of images are relative to the file; URLs work too. Each <image> stands for one image. All of
it is checked first; nothing is trained while anything is wrong.
"""


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
    add("--lora-alpha", 32.0, "scale of LoRA, divided by its rank")
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


def run(options: argparse.Namespace) -> int:
    """Run `xgenmm finetune`; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return _run(options)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _run(options: argparse.Namespace) -> int:
    settings = _settings(options)
    folder = resolve(options.checkpoint)
    config = read_config(folder)
    check_trainable(config, folder)
    tokenizer = training_tokenizer(folder, config)
    dataset = read_dataset(options.data, options.max_images, options.seed)
    images = _image_reader(options)
    is_main = int(os.environ.get("RANK", "0")) == 0  # of `accelerate launch` and `torchrun`
    if is_main:
        report = checked(dataset, config, tokenizer, images, options.max_tokens)
        print(describe(report, options.max_tokens, config.decoder.max_positions))
        if report_faults(report):
            return 1
    if options.check:
        return 0
    reader = RowReader(config, tokenizer, images, options.max_tokens)
    result = Training(folder, reader, dataset.samples, settings, options.output).run()
    if is_main:
        print(result)
    return 0


def _image_reader(options: argparse.Namespace) -> ImageReader:
    downloads = options.output / DOWNLOADS if options.output else None
    if not options.untrusted:
        return ImageReader(downloads)
    data: Path = options.data
    root = data if data.is_dir() else data.parent
    return ImageReader(downloads, FetchLimits(private_addresses=False), root)


def _settings(options: argparse.Namespace) -> TrainingSettings:
    """Raises InputError, naming the option, if a number is out of range."""
    for name in (
        "max_tokens",
        "max_images",
        "lora_rank",
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
    rate = options.learning_rate or (2e-5 if options.full else 1e-4)
    if not 0 < rate < 1:
        raise InputError("learning-rate", "must be above 0 and below 1")
    target = TrainingTarget(
        options.full,
        options.lora_rank,
        options.lora_alpha,
        tuple(options.lora_targets),
        options.resampler,
    )
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
        **{name: getattr(options, name) for name in same},
    )


def check_trainable(config: XGenMMConfig, folder: Path) -> None:
    """Refuse the checkpoints whose training the authors did not publish."""
    if config.resampler.text_tokens or not config.resampler.masked or config.temporal is not None:
        raise CheckpointError(
            f"{folder.name} cannot be fine-tuned: only the image models v1.5 and demo can"
        )


def training_tokenizer(folder: Path, config: XGenMMConfig) -> Tokenizer:
    """Read the tokenizer in the slow convention, as every v1.5 model is fine-tuned with it.

    Raises CheckpointError if it cannot be read or lacks `<pad>`.
    """
    chat = replace(config, text=replace(config.text, convention="slow", prompt="chat"))
    tokenizer = read_tokenizer(folder, chat)
    if PAD not in tokenizer.specials:
        raise CheckpointError(f"tokenizer: {folder}: added_tokens.json lacks {PAD}")
    return tokenizer


def checked(
    dataset: Dataset,
    config: XGenMMConfig,
    tokenizer: Tokenizer,
    reader: ImageReader,
    max_tokens: int,
) -> Report:
    """Check a dataset, with a progress bar of its images."""
    images = {
        (placed.place.file.parent, source)
        for placed in dataset.samples
        for source in placed.sample.images
    }
    with tqdm(total=len(images), desc="checking images", unit="image") as bar:
        return check_dataset(dataset, config, tokenizer, reader, max_tokens, lambda: bar.update())


def report_faults(report: Report) -> int:
    """Print every fault; return the exit status."""
    for fault in report.faults:
        print(f"FAULT {fault}")
    print(f"{len(report.positions)} samples, {len(report.faults)} faults")
    return 1 if report.faults else 0


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xgenmm merge`."""
    parser.description = (
        "Write a whole checkpoint, in the released layout, from an adapter and the checkpoint that "
        "it was trained on.\n\n    xgenmm merge demo OUTPUT/adapter -o weights/mine"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what the adapter was trained on")
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="the adapter: a folder or tar"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder"
    )


def run_merge(options: argparse.Namespace) -> int:
    """Run `xgenmm merge`; return the exit status."""
    if options.output.exists():
        raise CheckpointError(f"{options.output} exists already; give a new folder")
    write_checkpoint(resolve(options.checkpoint), options.adapter, options.output)
    print(options.output)
    return 0
