"""Download from hostile hubs and over damaged state, and count how many are refused clearly.

    python -m scripts.hostile.downloads            # a line for each class of case
    python -m scripts.hostile.downloads -v         # and one for each case that is not handled
    python -m scripts.hostile.downloads "listing"  # only classes whose name contains this

Each case runs `xgenmm download` (or another command) against a local hub, in a process of its own.
It is refused if the command ends within three minutes, without much memory or disk, with exit
status 1. It is handled if it also prints an error of at most a screen that names the cause, and if
the download succeeds once the hub is honest (or, for damaged state, once what the error names is
deleted).
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from scripts.hostile.download_cases import Case, all_cases
from scripts.hostile.isolation import LONGEST_MESSAGE, Outcome, print_table, run
from tests.support.hub_repository import NAME, REPO, repository
from tests.support.hub_server import HubServer
from xgenmm.__main__ import main as xgenmm_command

SECONDS = 180.0
MORE_DISK = 64 << 20


def _disk_used(root: Path) -> int:
    paths = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_blocks * 512 for path in paths)


@contextlib.contextmanager
def _watched_disk(root: Path) -> Iterator[list[int]]:
    """Collect how much disk is taken in addition, as long as the block runs."""
    before, used, done = _disk_used(root), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(OSError):  # a file has gone
                used.append(_disk_used(root) - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield used
    done.set()
    thread.join()


def attempt(case: Case, root: Path) -> str:
    """Run the command of a case, and then the download from an honest hub."""
    os.environ |= {"XGENMM_HOME": str(root), "NO_PROXY": "127.0.0.1,localhost"}
    with HubServer({REPO: repository()}) as hub:
        os.environ["HF_ENDPOINT"] = hub.url  # read when the hub's client is imported, below
        case.prepare(hub, root)
        with _watched_disk(root) as peak:
            status, shown = _command(case.arguments)
        case.repair(hub, root)
        repaired = ""
        for _ in range(2):  # the first may say that wrong bytes of the other hub are now deleted
            if not (root / NAME).is_dir():
                repaired = _command(("download", NAME))[1]
        complete = (root / NAME).is_dir()
    result = {"status": status, "shown": shown, "disk": max(peak), "repaired": complete or repaired}
    return json.dumps(result)


def _command(arguments: tuple[str, ...]) -> tuple[int, str]:
    """Run `xgenmm`; return its exit status and what it wrote to both streams."""
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        try:
            status = xgenmm_command(arguments)
        except BaseException as error:
            return 255, f"Traceback {type(error).__name__}: {error}"
    return status, stream.getvalue()


def run_case(case: Case) -> tuple[bool, bool, Outcome]:
    """Run one case; return whether it was refused (or succeeded, if it must) and handled."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(partial(attempt, case, Path(folder) / "weights"), SECONDS)
    if outcome.ended != "returned":
        return False, False, outcome
    result = json.loads(outcome.text)
    shown = result["shown"]
    clear = all(word in shown for word in case.words) and "\x1b" not in shown
    right_status = result["status"] == (1 if case.words else 0)
    bounded = len(shown) <= LONGEST_MESSAGE
    refused = right_status and result["disk"] < MORE_DISK
    return refused, refused and clear and bounded and result["repaired"] is True, outcome


def main() -> int:
    """Run all cases and print the table; return 1 if one was not handled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("only", nargs="?", default="")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    cases = [case for case in all_cases() if options.only in case.group]
    with ThreadPoolExecutor(8) as pool:  # most of them wait
        outcomes = pool.map(run_case, cases)
        results = ((case, *outcome) for case, outcome in zip(cases, outcomes, strict=True))
        return print_table(results, options.verbose)


if __name__ == "__main__":
    sys.exit(main())
