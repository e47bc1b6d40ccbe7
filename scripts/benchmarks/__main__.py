"""Measure what the documentation claims: python -m scripts.benchmarks [PART...] [--json FILE]

Prints a Markdown table: what was measured, its goal if it has one, and whether that is met. Each
ratio compares two figures of one run, measured alternately, so that other work on the machine
affects both equally. The exit status is 1 if a goal is missed.

host       a model that costs nothing, CPU: the engine's own work in a step; Cog's server with
           streaming clients
http       demo checkpoint, CPU: 16 clients of Cog's server against one; one request through the
           engine against the same model without it
peers      demo checkpoint and mid-size random model, CPU: 64 image questions at once against vLLM
           and a loop over `transformers`
image      mid-size random model: the second question on an image against the first
clip       the same for a video model, on clips of 8 frames
video      8 frames of a clip by seeking against decoding everything
golden     the original implementation's cases in one batch with other requests (needs --golden)
soak       random requests, valid or not, read, cancelled or abandoned: slots, memory, outcomes
choices    demo checkpoint: right answers by `choices` against free ones; JSON by a schema
quantised  demo checkpoint: right answers and drift of the logits by kind of quantisation
cpu        mid-size random model against `transformers`
gpu        random model of the released size: everything that depends on a GPU
caption    the program for datasets against loops of single predictions

Example: python -m scripts.benchmarks http cpu --json figures.json
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from scripts.benchmarks.caption import caption
from scripts.benchmarks.choices import choices
from scripts.benchmarks.cpu import cpu
from scripts.benchmarks.golden import golden, golden_folders
from scripts.benchmarks.gpu.run import gpu
from scripts.benchmarks.host import host
from scripts.benchmarks.http import http
from scripts.benchmarks.image import clip, image
from scripts.benchmarks.peers import peers
from scripts.benchmarks.quantised import quantised
from scripts.benchmarks.report import HEAD, Options, Row, machine
from scripts.benchmarks.soak import soak
from scripts.benchmarks.video import video
from xgenmm import InputError

PARTS: Mapping[str, Callable[[Options], Iterable[Row]]] = {
    "host": host,
    "http": http,
    "peers": peers,
    "image": image,
    "clip": clip,
    "video": video,
    "golden": golden,
    "soak": soak,
    "choices": choices,
    "quantised": quantised,
    "cpu": cpu,
    "gpu": gpu,
    "caption": caption,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status, 1 if a goal is missed."""
    parser = _parser()
    parsed = vars(parser.parse_args(arguments))
    chosen, json_file, markdown_file = (parsed.pop(k) for k in ("parts", "json", "markdown"))
    options = Options(**parsed)
    names = _names(parser, chosen, options)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    print(f"{machine()}\n\n{HEAD}")
    rows: list[Row] = []
    for name in names:
        for row in PARTS[name](options):
            print(row, flush=True)
            rows.append(row)
    if markdown_file:
        table = "\n".join([HEAD, *map(str, rows)])
        markdown_file.write_text(f"{machine()}\n\n{table}\n")
    if json_file:
        figures = [asdict(row) | {"met": row.met} for row in rows]
        json_file.write_text(json.dumps({"machine": machine(), "rows": figures}, indent=1) + "\n")
    return 1 if any(row.met is False for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Options()
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(PARTS)}, or all: every part that this machine and the options allow "
        "(the default)",
    )
    parser.add_argument("--requests", type=int, help="requests, instead of each part's own number")
    parser.add_argument(
        "--scenes",
        type=int,
        default=default.scenes,
        help=f"choices, quantised: scenes of the evaluation set (default: {default.scenes})",
    )
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="a folder of golden folders")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="cpu, gpu: only check that they run, on any device; the figures mean nothing",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=default.rounds,
        help=f"caption, host, peers, video: rounds of all measurements (default: {default.rounds})",
    )
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="PYTHON",
        default=default.vllm,
        help=f"peers: the interpreter of vLLM's environment (default: {default.vllm})",
    )
    caption_group = parser.add_argument_group("caption")
    for name, description in (
        ("images", "images of the data set"),
        ("single", "images for each loop of single predictions, over all rounds"),
        ("model", "a released name, demo, or a checkpoint folder"),
        ("actors", "Ray actors"),
    ):
        value = getattr(default, name)
        help_text = f"{description} (default: {value})"
        caption_group.add_argument(f"--{name}", type=type(value), default=value, help=help_text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the table to FILE"
    )
    return parser


def _names(parser: argparse.ArgumentParser, parts: Sequence[str], options: Options) -> list[str]:
    """The names of the parts to run; exits with an error for one that cannot run."""
    if unknown := set(parts) - {*PARTS, "all"}:
        parser.error(
            f"unknown part: {', '.join(sorted(unknown))}; must be {', '.join(PARTS)} or all"
        )
    everything = not parts or "all" in parts
    if options.golden or (not everything and "golden" in parts):
        try:
            golden_folders(options.golden)
        except InputError as error:
            parser.error(str(error))
    has_gpu = torch.cuda.is_available() or options.tiny
    if everything:
        possible = {"gpu": torch.cuda.is_available(), "golden": options.golden is not None}
        return [name for name in PARTS if possible.get(name, True)]
    if "gpu" in parts and not has_gpu:
        parser.error("gpu: PyTorch finds no GPU; with --tiny it runs, but its figures mean nothing")
    return list(parts)


if __name__ == "__main__":
    sys.exit(main())
