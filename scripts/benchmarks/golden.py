"""The part `golden`: golden cases through the engine, in one batch with other requests."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.benchmarks.report import Options, Row
from xgenmm import InputError
from xgenmm.evaluation.engine_parity import Comparison, check_engine

logger = logging.getLogger(__name__)


SEEDS = 3


def golden(options: Options) -> Iterator[Row]:
    """Compare token ids with those of the original implementation.

    Requests with other settings run in the same batch; their ids are compared with those that they
    get alone.
    """
    folders = golden_folders(options.golden)
    yield from _compare(folders, 0, few_blocks=False)
    for seed in range(SEEDS):
        yield from _compare(folders, seed, few_blocks=True)


def _compare(folders: Sequence[Path], seed: int, *, few_blocks: bool) -> list[Row]:
    compared, preemptions = list[Comparison](), 0
    for folder in folders:
        results, count = check_engine(folder, seed, few_blocks=few_blocks)
        compared, preemptions = compared + results, preemptions + count
    for result in compared:
        if result.found != result.expected:
            logger.warning("%s: %s instead of %s", result.name, result.found, result.expected)
    rows = []
    where = f"{'few' if few_blocks else 'enough'} blocks, {preemptions} preemptions"
    for is_golden, what in ((True, "golden ids as the original's"), (False, "others as alone")):
        equal = [r.found == r.expected for r in compared if r.golden is is_golden]
        share = 100 * sum(equal) / len(equal)
        title = f"{what}: {sum(equal)} of {len(equal)} ({where})"
        rows.append(Row("golden", title, share, "%", 100))
    return rows


def golden_folders(folder: Path | None) -> list[Path]:
    """The golden folders in `folder` that contain a model.

    Raises:
        InputError: there is none, or `folder` is None.
    """
    if folder is None:
        raise InputError(
            "golden",
            "give --golden FOLDER, a folder of golden folders, each with cases.json and "
            "model.safetensors",
        )
    found = sorted(file.parent for file in folder.glob("*/model.safetensors"))
    if not found:
        raise InputError("golden", f"{folder} has no folder with a model.safetensors in it")
    return found
