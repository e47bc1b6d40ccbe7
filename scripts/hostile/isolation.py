"""Run a hostile case in a process of its own, bounded in time and memory."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

SECONDS = 30.0
GROWTH_BYTES = 700 << 20
LARGEST_FILE = 4 << 30  # bytes; a sparse file of a case may have more
LONGEST_MESSAGE = 4000  # characters, about a screen


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `returned` with a value, `raised` a kind of error, or was `stopped`."""

    ended: str
    kind: str
    text: str

    def __str__(self) -> str:
        text = self.text if len(self.text) < 200 else f"{self.text[:200]}... ({len(self.text)})"
        return f"{self.ended} {self.kind}: {text}"


class NamedCase(Protocol):
    """What all kits' cases have: a class of attack and a name."""

    @property
    def group(self) -> str: ...

    @property
    def name(self) -> str: ...


def run(
    action: Callable[[], str], seconds: float = SECONDS, growth_bytes: int = GROWTH_BYTES
) -> Outcome:
    """Run `action` in a forked process; stop it after `seconds` or `growth_bytes` more memory."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(action, sender))
    process.start()
    sender.close()
    assert process.pid is not None
    limit = _resident_bytes(os.getpid()) + growth_bytes
    deadline = time.monotonic() + seconds
    outcome = None
    while outcome is None:
        if receiver.poll(0.02):
            outcome = _receive(receiver)
        elif time.monotonic() > deadline:
            outcome = Outcome("stopped", "time", f"after {seconds:.0f} s")
        elif _resident_bytes(process.pid) > limit:
            outcome = Outcome("stopped", "memory", f"over {growth_bytes >> 20} MB")
    if outcome.ended == "stopped":
        process.kill()
    process.join()
    if outcome.ended == "lost":
        return Outcome("stopped", f"exit {process.exitcode}", "the process died")
    return outcome


def _run(action: Callable[[], str], sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        outcome = Outcome("returned", "value", action())
    except BaseException as error:
        outcome = Outcome("raised", type(error).__name__, str(error))
    sender.send(outcome)
    sender.close()
    os._exit(0)


def _receive(receiver: Connection) -> Outcome:
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        return Outcome("lost", "", "")
    return outcome


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def print_table(results: Iterable[tuple[NamedCase, bool, bool, Outcome]], verbose: bool) -> int:
    """Print how many cases of each class are refused and handled; return 1 if one is not.

    results: case, whether it was refused (or in order), whether it was handled, how it ended.
    verbose: also print each case that was not handled, as soon as it has ended.
    """
    counts: dict[str, list[int]] = {}
    for case, refused, handled, outcome in results:
        count = counts.setdefault(case.group, [0, 0, 0])
        counts[case.group] = [count[0] + 1, count[1] + refused, count[2] + handled]
        if verbose and not handled:
            print(f"  {case.group}: {case.name}: {outcome}", flush=True)
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"{'class':<40}{'cases':>7}{'refused':>9}{'handled':>9}")
    for group, numbers in counts.items():
        print(f"{group:<40}" + "{:>7}{:>9}{:>9}".format(*numbers))
    return int(counts["all"][0] != counts["all"][2])
