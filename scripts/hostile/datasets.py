"""Try `xgenmm caption` on hostile datasets: python -m scripts.hostile.datasets [GROUP...]

Prints a Markdown table: class of attack, cases, handled. A case is handled if the program ends in
time, without a traceback and with bounded memory, and either gives every record its rows, those
that cannot be used with an error, or refuses in one line that names the file.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.hostile.address_cases import address_cases, hostile_server
from scripts.hostile.files import write_images
from scripts.hostile.interrupt_cases import interrupt_outcomes
from scripts.hostile.output_cases import hive_case, output_cases
from scripts.hostile.runner import Arguments, Case, Outcome, run_case, start_forkserver
from scripts.hostile.table_cases import table_cases
from scripts.hostile.tar_cases import folder_cases, tar_cases

WAITING_GROUP, INTERRUPT_GROUP = "addresses that hang", "Ctrl-C"
HANG_SECONDS = 200.0  # longer than a download may take
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status is 1 if a case is not handled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="default: all")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="to test another version")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time; default: 2")
    parser.add_argument("--seconds", type=float, default=60, help="for each case; default: 60")
    options = parser.parse_args(arguments)
    sys.setrecursionlimit(10_000)  # to delete the deep folders; the cases keep the default
    start_forkserver(options.checkout.resolve())
    with tempfile.TemporaryDirectory() as name, hostile_server() as port:
        outcomes = []
        for outcome in _outcomes(Path(name), port, options):
            outcomes.append(outcome)
            if outcome.problem:
                print(f"{outcome.case.group}, {outcome.case.name}: {outcome.problem}", flush=True)
    print(_table(outcomes))
    return int(any(outcome.problem for outcome in outcomes))


def _outcomes(folder: Path, port: int, options: argparse.Namespace) -> Iterator[Outcome]:
    cases = [
        case for case in _cases(folder, port) if not options.groups or case.group in options.groups
    ]
    waiting = [case for case in cases if case.group == WAITING_GROUP]
    busy = [case for case in cases if case.group != WAITING_GROUP]
    with ThreadPoolExecutor(options.jobs) as pool:
        yield from pool.map(lambda case: run_case(case, folder, options.seconds), busy)
    with ThreadPoolExecutor(len(waiting) or 1) as pool:
        yield from pool.map(lambda case: run_case(case, folder, HANG_SECONDS), waiting)
    if not options.groups or INTERRUPT_GROUP in options.groups:
        yield from interrupt_outcomes(folder, port, HANG_SECONDS)


def _cases(folder: Path, port: int) -> Iterator[Case]:
    images = write_images(folder / "normal images", 3)
    outputs = {}
    for format_ in ("jsonl", "parquet"):
        outcome = run_case(_normal_case(images, format_), folder, HANG_SECONDS)
        if outcome.problem:
            raise RuntimeError(f"a normal run fails: {outcome.problem}")
        outputs[format_] = outcome.folder / "out"
    yield from output_cases(outputs, images)
    yield hive_case()
    yield from table_cases()
    yield from tar_cases()
    yield from folder_cases()
    yield from address_cases(port)


def _normal_case(images: Path, format_: str) -> Case:
    def build(_: Path) -> Arguments:
        return [str(images), "--format", format_]

    return Case("normal", format_, build, rows=3, errors=0)


def _table(outcomes: Iterable[Outcome]) -> str:
    groups = defaultdict[str, list[bool]](list)
    for outcome in outcomes:
        groups[outcome.case.group].append(not outcome.problem)
    lines = ["| class | cases | handled |", "|---|---|---|"]
    lines += [f"| {name} | {len(cases)} | {sum(cases)} |" for name, cases in groups.items()]
    total = [handled for cases in groups.values() for handled in cases]
    return "\n".join([*lines, f"| all | {len(total)} | {sum(total)} |"])


if __name__ == "__main__":
    sys.exit(main())
