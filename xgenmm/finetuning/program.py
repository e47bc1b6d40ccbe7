"""The command `xgenmm finetune`."""

import argparse
import logging
import os
import sys
from pathlib import Path

from xgenmm.checkpoints.registry import resolve
from xgenmm.config import XGenMMConfig
from xgenmm.errors import CheckpointError, InputError
from xgenmm.finetuning.check import Report, check_dataset, describe
from xgenmm.finetuning.checkpoint import read_trained
from xgenmm.finetuning.dataset import Dataset, read_dataset
from xgenmm.finetuning.display import Progress
from xgenmm.finetuning.images import ImageReader
from xgenmm.finetuning.loader import RowReader
from xgenmm.finetuning.merge import write_checkpoint
from xgenmm.finetuning.options import add_arguments as add_arguments
from xgenmm.finetuning.options import training_settings
from xgenmm.finetuning.progress import DOWNLOADS
from xgenmm.finetuning.training import Training
from xgenmm.preprocessing.fetch import FetchLimits
from xgenmm.preprocessing.tokenizer import Tokenizer

DESCRIPTION = """\
Train a checkpoint on your own images and answers.

    xgenmm finetune demo data.jsonl --check
    xgenmm finetune demo data.jsonl -o OUTPUT

OUTPUT gets the adapter (`adapter`; with --full or for a base model a whole `checkpoint`),
`log.jsonl` and a plot of the losses. The same command continues a run that was killed. On several
GPUs, run it as `accelerate launch --multi_gpu -m xgenmm finetune ...`.

DATA is a file, a folder of files, or a mix (.yaml, `data_path: {a.jsonl: 1000, b.json: null}`). A
.jsonl file has one sample a line, a .json file a list of samples, each in one of two formats:

    {"messages": [{"role": "user", "content": "<image>What is it?"},
                  {"role": "assistant", "content": "A mill."}], "images": ["mill.jpg"]}
    {"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                       {"from": "gpt", "value": "A mill."}], "image": "mill.jpg"}

Paths of images are relative to the file; URLs work too. Each <image> stands for one image. All of
it is checked first; nothing is trained while anything is wrong.
"""

FAULT = "FAULT "
"""What each line of a fault begins with."""


def run(options: argparse.Namespace) -> int:
    """Run `xgenmm finetune`; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return _run(options)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _run(options: argparse.Namespace) -> int:
    settings = training_settings(options)
    checkpoint = read_trained(resolve(options.checkpoint))
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
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
    training = Training(
        checkpoint, reader, dataset.samples, settings, options.output, sharded=options.shard
    )
    result = training.run()
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
    with Progress(len(images), "image") as progress:
        return check_dataset(dataset, config, tokenizer, reader, max_tokens, progress.update)


def report_faults(report: Report) -> int:
    """Print every fault; return the exit status."""
    for fault in report.faults:
        print(f"{FAULT}{fault}")
    samples, faults = len(report.positions), len(report.faults)
    print(f"{samples} sample{'s' * (samples != 1)}, {faults} fault{'s' * (faults != 1)}")
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
