"""The command `xgenmm scores`: measured results beside the published ones."""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xgenmm.errors import CheckpointError, printable
from xgenmm.evaluation.published import Benchmark, Cell, Table, markdown, published_tables
from xgenmm.files import read_json_object

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Compare results of lmms-eval with those that the authors published, as Markdown tables, with the
commands that measure them. What has not been measured stays empty.

    xgenmm scores results           # a folder of lmms-eval's --output_path, or single files
    xgenmm scores                   # the published results alone
"""

PATTERN = "*_results.json"


class ResultsError(CheckpointError):
    """A file of results is missing, damaged or not lmms-eval's; the message names it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `xgenmm scores`."""
    parser.add_argument(
        "results", type=Path, nargs="*", help="files or folders that lmms-eval wrote"
    )


def run(options: argparse.Namespace) -> int:
    """Run `xgenmm scores`; return its exit status. Raises ResultsError."""
    sys.stdout.write(scores(options.results))
    return 0


def scores(paths: Sequence[Path]) -> str:
    """Return the published tables, filled with the results in files and folders.

    The newest of several results counts. Results of a part of a task (`--limit`) do not.

    Raises ResultsError for a path without results, or a file that is not as lmms-eval writes it.
    """
    tables = published_tables()
    measured: dict[Cell, float] = {}
    for path in sorted(_files(paths), key=lambda path: path.name):  # names begin with the date
        found = dict(_results(path, tables))
        if not found:
            logger.warning("%s has no result for these tables", path)
        measured |= found
    return markdown(tables, measured)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        files = [path] if path.is_file() else list(path.rglob(PATTERN))
        if not files:
            raise ResultsError(f"{path}: no file {PATTERN}; give what --output_path was")
        yield from files


def _results(path: Path, tables: Sequence[Table]) -> Iterator[tuple[Cell, float]]:
    """The results of a file that belong into the tables."""
    try:
        content = read_json_object(path)
        arguments = _model_arguments(content["config"]["model_args"])
        limit, results = content["config"]["limit"], dict(content["results"])
        model = Path(arguments["pretrained"]).name
        fewshot = int(arguments.get("fewshot", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not a file of lmms-eval's results ({error!r})") from error
    if limit is not None:
        logger.warning("%s: only %s questions of each task were asked", path, limit)
        return
    for table in tables:
        for benchmark, _ in table.rows:
            for column in table.columns:
                if (column.model, column.fewshot) == (model, fewshot) and benchmark.task in results:
                    metrics = _metrics(path, benchmark, results[benchmark.task])
                    yield column.cell(benchmark), benchmark.result(metrics)


def _model_arguments(text: str) -> dict[str, str]:
    """`pretrained=NAME,fewshot=4` by name."""
    return dict(argument.split("=", 1) for argument in text.split(",") if "=" in argument)


def _metrics(path: Path, benchmark: Benchmark, result: Any) -> Mapping[str, float]:
    """The metrics of a benchmark by name; lmms-eval writes `NAME,FILTER`.

    Raises ResultsError if one is missing or no number.
    """
    metrics = {}
    for name in benchmark.metrics:
        values = [value for key, value in dict(result).items() if key.split(",")[0] == name]
        if not values or isinstance(values[0], bool) or not isinstance(values[0], int | float):
            shown = printable(values[0]) if values else "missing"
            raise ResultsError(
                f"{path}: {name} of {benchmark.task} must be a number, but is {shown}"
            )
        metrics[name] = values[0]
    return metrics
