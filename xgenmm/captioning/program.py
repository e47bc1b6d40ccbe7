"""The sub-command `xgenmm caption`: options, settings of OUTPUT, progress and exit status."""

import argparse
import logging
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xgenmm.captioning.media import video_suffixes
from xgenmm.captioning.pipeline import CaptionTask, caption_in_process
from xgenmm.captioning.ray_pipeline import caption_with_ray
from xgenmm.captioning.records import Record, Row, escape_surrogates
from xgenmm.captioning.shards import Shards, open_shards
from xgenmm.captioning.sources import count_records, read_records
from xgenmm.captioning.templates import escape_template
from xgenmm.checkpoints.registry import read_config, resolve
from xgenmm.engine.sampling_params import LIMITS, SamplingParams
from xgenmm.errors import CheckpointError, EngineError, InputError
from xgenmm.preprocessing.fetch import FetchLimits
from xgenmm.preprocessing.video import DEFAULT_FRAMES, MAX_FRAMES, FrameSelection

DESCRIPTION = """\
Ask the same questions about every image or video of a dataset.

    xgenmm caption photos -o captions
    xgenmm caption laion.parquet -o captions.jsonl --image-column url \\
        --template "The page says: {alt} What does the image show?"
    xgenmm caption "shards/*.tar" -o counts --question "How many people?" --ray local

INPUT is a folder of images or videos, a table (.jsonl, .csv, .parquet) with a column of paths or
URLs, or WebDataset tars (a folder, a file or a pattern). OUTPUT is a folder of shards with a row
for each image or video and question. What cannot be read gets a row with an error. To continue a
run that was interrupted, give the same command again.

Video models take videos; interleave and dpo models take their frames as images.
"""

FORMATS = ("parquet", "jsonl")
QUANTIZATIONS = ("int8", "fp8")  # those of `models.quantization`, which imports PyTorch
SHARD_ROWS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xgenmm caption`."""
    add = parser.add_argument
    model = os.environ.get("XGENMM_MODEL") or "demo"
    add("input", metavar="INPUT", help="folder, table, or tars")
    add("-o", "--output", type=Path, required=True, help="folder for the shards")
    add(
        "--question",
        dest="templates",
        action="append",
        type=escape_template,
        metavar="QUESTION",
        help="asked as it is; may be repeated; default: describe the image",
    )
    add(
        "--template",
        dest="templates",
        action="append",
        metavar="TEMPLATE",
        help="a question with the row's {columns} filled in; may be repeated",
    )
    add("--image-column", default="image", help="a table's column of paths or URLs; default: image")
    add("--model", default=model, help=f"name or folder of a checkpoint; default: {model}")
    add(
        "--adapter",
        default=os.environ.get("XGENMM_ADAPTER"),
        help="folder or tar from fine-tuning the model; default: $XGENMM_ADAPTER, or none",
    )
    add("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    add("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        help="type of the decoder's weights; default: not quantized",
    )
    add("--format", choices=FORMATS, help="default: the suffix of OUTPUT, or parquet")
    add("--shard-rows", type=int, default=SHARD_ROWS, help=f"default: {SHARD_ROWS}")
    add("--ray", metavar="ADDRESS", help="run on a Ray cluster; local: start one on this machine")
    add("--actors", type=int, help="engines with --ray; default: one per GPU, else per CPU core")
    add("--system-prompt", help="default: the one used in training")
    _add_video_arguments(parser)
    _add_download_arguments(parser)
    _add_sampling_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run `xgenmm caption` with the parsed arguments; return its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        _caption(options)
    except (CheckpointError, EngineError, InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; give the same command again to continue", file=sys.stderr)
        return 130
    return 0


def _add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `FrameSelection` that a dataset may need."""
    parser.add_argument(
        "--num-frames",
        type=int,
        help=f"frames of each video, 1 to {MAX_FRAMES}; default: {DEFAULT_FRAMES}, or all of a "
        "shorter one",
    )
    for name, default in (("start", "the first frame"), ("end", "the last frame")):
        parser.add_argument(
            f"--{name}",
            type=float,
            metavar="SECONDS",
            help=f"{name} of the part of each video to take frames from; default: {default}",
        )


def _add_download_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each limit of a download that users may want to change."""
    limits = FetchLimits()
    parser.add_argument(
        "--download-seconds",
        type=float,
        default=limits.seconds,
        help=f"longest time for a download; default: {limits.seconds:g}",
    )
    parser.add_argument(
        "--download-bytes",
        type=int,
        default=limits.max_bytes,
        help=f"largest download; default: {limits.max_bytes}",
    )
    parser.add_argument(
        "--public-addresses-only",
        action="store_true",
        help="refuse URLs that lead to this machine or its network",
    )


def _download_limits(options: argparse.Namespace) -> FetchLimits:
    if options.download_bytes < 1:
        raise InputError("download-bytes", f"must be at least 1, not {options.download_bytes}")
    if not options.download_seconds > 0:  # also refuses NaN
        raise InputError("download-seconds", f"must be above 0, not {options.download_seconds}")
    return FetchLimits(
        seconds=options.download_seconds,
        max_bytes=options.download_bytes,
        private_addresses=not options.public_addresses_only,
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `SamplingParams`."""
    defaults = SamplingParams()
    for name in LIMITS:
        default = getattr(defaults, name)
        type_ = float if isinstance(default, float) else int
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type_,
            default=default,
            help="default: random" if default is None else f"default: {default}",
        )
    parser.add_argument(
        "--stop",
        dest="stop_sequences",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; may be repeated",
    )


def _caption(options: argparse.Namespace) -> None:
    if options.shard_rows < 1:
        raise InputError("shard-rows", f"must be at least 1, not {options.shard_rows}")
    sampling = SamplingParams(**{f.name: getattr(options, f.name) for f in fields(SamplingParams)})
    task = CaptionTask(
        options.model,
        options.adapter or None,
        options.device,
        options.dtype,
        options.quantize,
        options.system_prompt,
        sampling,
        _download_limits(options),
        FrameSelection(options.num_frames, options.start, options.end),
    )
    task.frames.check()
    config = read_config(resolve(task.model))
    videos = video_suffixes(config)
    templates = options.templates or [escape_template(config.text.caption_question)]
    format_ = options.format or options.output.suffix.removeprefix(".")
    if format_ not in FORMATS:
        format_ = "parquet"
    source = (options.input, templates, options.image_column, videos)
    count = count_records(*source)
    settings = _settings(options, task, templates)
    with open_shards(options.output, format_, options.shard_rows, settings) as shards:
        pending = shards.pending(read_records(*source))
        rows = _caption_records(task, pending, options.ray, options.actors)
        written, errors = _write(shards, rows, options.output.name, count, len(templates))
    output = escape_surrogates(str(options.output))
    print(f"{output}: {written} new rows, {errors} with an error")


def _settings(
    options: argparse.Namespace, task: CaptionTask, templates: Sequence[str]
) -> dict[str, Any]:
    """Return everything that the rows depend on, for `open_shards`."""
    return {
        "input": str(Path(options.input)),
        "image_column": options.image_column,
        "questions": templates,
        "model": task.model,
        "adapter": _adapter_digest(task),
        "dtype": task.dtype,
        "quantize": task.quantize,
        "system_prompt": task.system_prompt,
        "num_frames": task.frames.num_frames,
        "start": task.frames.start,
        "end": task.frames.end,
        **asdict(task.sampling),
    }


def _adapter_digest(task: CaptionTask) -> str | None:
    """Return what identifies the adapter, after it was checked; training may replace its folder.

    Raises CheckpointError if it is not one for the model.
    """
    if task.adapter is None:
        return None
    # Needs PyTorch, which takes seconds to import; a run on Ray does without it here.
    from xgenmm.checkpoints.adapter import read_adapter

    return read_adapter(task.adapter, resolve(task.model)).digest()


def _caption_records(
    task: CaptionTask, records: Iterator[Record], address: str | None, num_actors: int | None
) -> Generator[list[Row]]:
    first = next(records, None)
    if first is None:
        return  # without loading an engine
    records = chain([first], records)
    if address is not None:
        yield from caption_with_ray(task, records, address, num_actors)
    else:
        engine = task.load()
        yield from caption_in_process(engine, task, records)
        engine.close()  # not after Ctrl-C: it would finish the answers in progress


def _write(
    shards: Shards, rows: Generator[list[Row]], title: str, num_records: int, num_questions: int
) -> tuple[int, int]:
    """Add rows to `shards`, showing a progress bar; return the number of rows and of errors."""
    written = errors = 0
    with (
        tqdm(
            desc=title,
            total=num_records * num_questions,
            initial=len(shards.images) * num_questions,
            unit="row",
            dynamic_ncols=True,
        ) as progress,
        closing(rows),
    ):
        try:
            for record_rows in rows:
                shards.add(record_rows)
                written += len(record_rows)
                errors += sum(row.error is not None for row in record_rows)
                progress.update(len(record_rows))
        finally:
            shards.flush()  # before `rows` is closed, which takes Ray seconds
    return written, errors
