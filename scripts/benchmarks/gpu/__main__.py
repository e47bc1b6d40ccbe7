"""Measure everything that depends on a GPU: python -m scripts.benchmarks.gpu --output FILE

Takes a model of the released size with random weights. Each figure is printed and written to FILE
as a line of JSON as soon as it is measured, the most important ones first, so a run that is cut
short loses nothing that it has measured. A stage that fails or takes too long is a line with its
error, and the next stage runs.

Needs PyTorch, Triton and transformers; attention and all stages after `kernels` also einops, and
those from `engine` on cachetools and sentencepiece. `server` is skipped without cog.

Example: python -m scripts.benchmarks.gpu --output gpu.jsonl
         python -m scripts.benchmarks.gpu --report gpu.jsonl
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from scripts.benchmarks.gpu.figures import Record
from scripts.benchmarks.gpu.report import report
from scripts.benchmarks.gpu.run import BUDGET, STAGES, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status, 1 if a stage failed."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--output", type=Path, metavar="FILE", help="measure, and write to FILE")
    mode.add_argument("--report", type=Path, metavar="FILE", help="print what FILE has as Markdown")
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "--stages", nargs="+", choices=names, default=names, metavar="STAGE",
        help=f"some of {', '.join(names)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help=f"no stage runs longer than this in all (default: {BUDGET:g})",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="only check that everything runs, on any device; the figures mean nothing",
    )
    options = parser.parse_args(arguments)
    if options.report:
        print(report(_read(options.report)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the running stage too
    failed = False
    stages = [stage for stage in STAGES if stage.name in options.stages]
    with options.output.open("w") as file:
        for record in run(stages, tiny=options.tiny, budget=options.budget):
            line = json.dumps(record, ensure_ascii=False)
            print(line, flush=True)
            file.write(f"{line}\n")
            file.flush()
            failed |= "error" in record
    return int(failed)


def _read(file: Path) -> list[Record]:
    """The records of a file, the last of which may be cut off."""
    lines = file.read_text().splitlines()
    complete = takewhile(lambda line: line.endswith("}"), lines)
    return [json.loads(line) for line in complete]


if __name__ == "__main__":
    sys.exit(main())
