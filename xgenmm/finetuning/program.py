"""The command `xgenmm finetune`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from xgenmm.checkpoints.checks import read_tokenizer
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.config import XGenMMConfig
from xgenmm.errors import CheckpointError, InputError
from xgenmm.finetuning.check import Report, check_dataset, describe
from xgenmm.finetuning.conversation import MAX_TEXT_TOKENS, PAD
from xgenmm.finetuning.dataset import Dataset, read_dataset
from xgenmm.finetuning.images import ImageReader
from xgenmm.finetuning.samples import MAX_IMAGES
from xgenmm.preprocessing.tokenizer import Tokenizer

DESCRIPTION = """\
Train a checkpoint on your own images and answers.

    xgenmm finetune demo data.jsonl --check

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
    parser.add_argument(
        "--check",
        action="store_true",
        required=True,
        help="only check DATA, and show what it holds",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TEXT_TOKENS,
        metavar="N",
        help="cut the text of a sample after N tokens, images not counted (default: %(default)s)",
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=MAX_IMAGES,
        metavar="N",
        help="refuse samples of more images (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        help="of the samples chosen for a mix (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Run `xgenmm finetune`; return the exit status."""
    try:
        return _check(options)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _check(options: argparse.Namespace) -> int:
    folder = resolve(options.checkpoint)
    config = read_config(folder)
    check_trainable(config, folder)
    tokenizer = training_tokenizer(folder, config)
    dataset = read_dataset(options.data, options.max_images, options.seed)
    report = checked(dataset, config, tokenizer, options.max_tokens)
    print(describe(report, options.max_tokens, config.decoder.max_positions))
    return report_faults(report)


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
    dataset: Dataset, config: XGenMMConfig, tokenizer: Tokenizer, max_tokens: int
) -> Report:
    """Check a dataset, with a progress bar of its images."""
    images = {
        (placed.place.file.parent, source)
        for placed in dataset.samples
        for source in placed.sample.images
    }
    with tqdm(total=len(images), desc="checking images", unit="image") as bar:
        return check_dataset(
            dataset, config, tokenizer, ImageReader(), max_tokens, lambda: bar.update()
        )


def report_faults(report: Report) -> int:
    """Print every fault; return the exit status."""
    for fault in report.faults:
        print(f"FAULT {fault}")
    print(f"{len(report.positions)} samples, {len(report.faults)} faults")
    return 1 if report.faults else 0
