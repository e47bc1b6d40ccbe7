"""Ask about every image of a dataset.

    python -m xgenmm.captioning.program photos -o captions
    python -m xgenmm.captioning.program laion.parquet -o better --image-column url \\
        --template "The page says: {alt} What does the image show?" --model NAME
    python -m xgenmm.captioning.program shards/ -o answers.jsonl \\
        --question "How many people?" --ray local

INPUT is a folder of images, a table (.jsonl, .csv, .parquet) with paths or addresses, or
WebDataset tars (a folder, a file or a pattern). OUTPUT is a folder of shards with a row for each
image and question. Killed at any moment, the same command goes on: it does what is missing.
An image that cannot be read is a row with an error.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from xgenmm.captioning.datasets import (
    Record,
    Row,
    count_records,
    literal,
    open_shards,
    read_records,
)
from xgenmm.captioning.pipeline import CaptionTask, in_process, with_ray
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.engine.sampling_params import LIMITS, SamplingParams
from xgenmm.errors import CheckpointError, EngineError, InputError

FORMATS = ("parquet", "jsonl")
QUANTIZE = ("int8", "fp8")  # `quantization.QUANTIZATIONS`, for which one would wait for PyTorch
SHARD_ROWS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        _caption(_parser().parse_args(arguments))
    except (CheckpointError, EngineError, InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xgenmm.captioning.program",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    model = os.environ.get("XGENMM_MODEL") or "demo"
    add("input", metavar="INPUT", help="folder, table, or tars")
    add("-o", "--output", type=Path, required=True, help="folder for the shards")
    add(
        "--question",
        dest="templates",
        action="append",
        type=literal,
        help="may be repeated; default: describe the image",
    )
    add(
        "--template",
        dest="templates",
        action="append",
        metavar="TEMPLATE",
        help="a question with the row's {column} in it; may be repeated",
    )
    add("--image-column", default="image", help="of a table: the column of paths or addresses")
    add("--model", default=model, help=f"a released name or a folder; default: {model}")
    add("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    add("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--quantize", choices=QUANTIZE, help="of the decoder's weights; default: neither")
    add("--format", choices=FORMATS, help="default: what OUTPUT ends with, or parquet")
    add("--shard-rows", type=int, default=SHARD_ROWS, help=f"default: {SHARD_ROWS}")
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster; local: on this machine")
    add("--actors", type=int, help="engines with --ray; default: one a GPU, or one a CPU core")
    add("--system-prompt")
    defaults = SamplingParams()
    for name in LIMITS:
        default = getattr(defaults, name)
        kind = float if isinstance(default, float) else int
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"default: {default}")
    add("--stop", dest="stop_sequences", action="append", default=[], help="may be repeated")
    return parser


def _caption(options: argparse.Namespace) -> None:
    if options.shard_rows < 1:
        raise InputError("shard-rows", f"must be at least 1, not {options.shard_rows}")
    sampling = SamplingParams(**{f.name: getattr(options, f.name) for f in fields(SamplingParams)})
    task = CaptionTask(
        options.model,
        options.device,
        options.dtype,
        options.quantize,
        options.system_prompt,
        sampling,
    )
    caption_question = read_config(resolve(task.model)).text.caption_question
    templates = options.templates or [literal(caption_question)]
    format_ = options.format or options.output.suffix.removeprefix(".")
    if format_ not in FORMATS:
        format_ = "parquet"
    settings = {
        "input": str(Path(options.input)),
        "image_column": options.image_column,
        "questions": templates,
        "model": task.model,
        "dtype": task.dtype,
        "quantize": task.quantize,
        "system_prompt": task.system_prompt,
        **asdict(sampling),
    }
    count = count_records(options.input, templates, options.image_column)
    with open_shards(options.output, format_, options.shard_rows, settings) as shards:
        done, errors = len(shards.done), 0
        missing = shards.missing(read_records(options.input, templates, options.image_column))
        with tqdm(
            desc=options.output.name,
            total=count * len(templates),
            initial=done * len(templates),
            unit="row",
            dynamic_ncols=True,
        ) as bar:
            for rows in _answers(task, missing, options.ray, options.actors):
                shards.add(rows)
                errors += sum(row.error is not None for row in rows)
                bar.update(len(rows))
        new = (len(shards.done) - done) * len(templates)
    print(f"{options.output}: {new} rows were missing and are there, {errors} with an error")


def _answers(
    task: CaptionTask, records: Iterator[Record], address: str | None, actors: int | None
) -> Iterator[list[Row]]:
    first = next(records, None)
    if first is None:
        return  # without waiting for an engine that has nothing to do
    records = chain([first], records)
    if address is not None:
        yield from with_ray(task, records, address, actors)
    else:
        with closing(task.load()) as engine:
            yield from in_process(engine, task, records)


if __name__ == "__main__":
    sys.exit(main())
