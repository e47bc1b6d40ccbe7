"""Send mixed requests to Cog's server while its worker is killed again and again.

    python -m scripts.hostile.soak --requests 20000 --kills 10

About a third of the requests are hostile. Each must be answered right, be handled as
`scripts.hostile.server` expects, or fail because of a kill. A new server must answer right within
10 s of each kill. At the end, processes, memory, open files, threads and temporary files must be as
after the warm-up, in which each kind of request was sent once.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.hostile.address_cases import hostile_server
from scripts.hostile.kills import Killer
from scripts.hostile.normal_requests import EXAMPLES, learn
from scripts.hostile.process_usage import Meter, Usage
from scripts.hostile.requests import Case
from scripts.hostile.server import ENVIRONMENT, LOAD_SECONDS, PRIVATE_GROUP, all_cases, outcome_of
from scripts.hostile.soak_clients import KILLED, UNEXPECTED, Attempt, Mix
from scripts.local_server import LocalServer, serving

CLIENTS = 12
SLOW_SECONDS = 0.3
RECOVERY_SECONDS = 10.0
SETTLE_SECONDS = 100.0  # what a killed worker left on the disk is removed once it is a minute old
IDLE_SECONDS = 12.0  # in which idle threads of Cog's server end

# How much more of each than after the warm-up is not a leak.
# The processes that decode images and check schemas start when they are needed.
GROWTH = Usage(processes=2, memory=200 << 20, files=15, threads=10, temporary_files=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status is 1 if anything is not as it must be."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--requests", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--kills", type=int, default=10, help="default: 10")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, hostile_server() as port:
        limits = {"XGENMM_PRIVATE_ADDRESSES": "1", "XGENMM_FETCH_SECONDS": "1", "TMPDIR": folder}
        with serving(ENVIRONMENT | limits) as server:
            server.wait_ready(LOAD_SECONDS)
            return _soak(server, port, Path(folder), options.requests, options.kills)


def _soak(server: LocalServer, port: int, folder: Path, count: int, kills: int) -> int:
    started, meter = time.monotonic(), Meter(server.process.pid, folder)
    mix = _warm_up(server.url, port)
    seconds = time.monotonic() - started
    print(f"warm-up: {seconds:.0f} s, {len(mix.slow)} slow cases", flush=True)
    before = _settle(meter)
    started = time.monotonic()
    points = [count * (number + 1) // (kills + 1) for number in range(kills)]
    outcomes = Counter[str]()
    with Killer(server, points, meter) as killer:
        for name, text in _run_clients(server.url, mix, killer, count):
            outcomes[name] += 1
            if name == UNEXPECTED:
                print(text, flush=True)
    seconds = time.monotonic() - started
    after = _settle(meter, before)
    restarts = server.log_file.read_text(errors="replace").count("starting it again")
    _print_table(outcomes, seconds, killer, restarts)
    _print_usage(before, killer.loaded, after)
    return int(
        outcomes.total() != count
        or outcomes[UNEXPECTED] > 0
        or restarts != kills
        or max(killer.recoveries, default=0) > RECOVERY_SECONDS
        or not after.is_within(before, GROWTH)
    )


def _warm_up(url: str, port: int) -> Mix:
    """Send each kind of request once, to know which are slow; these will be rare."""
    hostile: list[Case] = []
    slow: list[Case] = []
    for case in all_cases(port):
        if case.costs == "server" or case.group == PRIVATE_GROUP:
            continue
        started = time.monotonic()
        if wrong := outcome_of(case, url):
            raise RuntimeError(f"{case.group}, {case.name}: {wrong}")
        is_slow = case.costs or time.monotonic() - started > SLOW_SECONDS
        (slow if is_slow else hostile).append(case)
    return Mix([*EXAMPLES, *learn(url)], hostile, slow)


def _run_clients(url: str, mix: Mix, killer: Killer, count: int) -> Iterator[tuple[str, str]]:
    """Run all requests; yields the name of each outcome and, if it is unexpected, what it was."""

    def run(number: int) -> tuple[str, str]:
        attempt = mix.draw(random.Random(number))
        killer.wait_up()
        started = time.monotonic()
        wrong = _problem(attempt, url)
        killed = killer.killed_between(started, time.monotonic())
        killer.count()
        if not wrong:
            return attempt.counts_as, ""
        return (KILLED, "") if killed else (UNEXPECTED, f"{number}: {attempt.name}: {wrong}")

    with ThreadPoolExecutor(CLIENTS) as pool:
        yield from pool.map(run, range(count))


def _problem(attempt: Attempt, url: str) -> str:
    try:
        return attempt.problem(attempt.send(url))
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def _settle(meter: Meter, before: Usage | None = None) -> Usage:
    """Wait until the server uses no more than `before`, or has no temporary files.

    Returns what it uses then.
    """
    time.sleep(IDLE_SECONDS)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = meter.measure()
        settled = now.is_within(before, GROWTH) if before else not now.temporary_files
        if settled or time.monotonic() > deadline:
            return now
        time.sleep(1)


def _print_table(outcomes: Counter[str], seconds: float, killer: Killer, restarts: int) -> None:
    print("\n| requests | |\n|---|---|")
    for name, number in outcomes.most_common():
        print(f"| {name} | {number} |")
    print(f"| all | {outcomes.total()}, {outcomes.total() / seconds:.0f} a second |")
    print(f"| workers killed | {len(killer.recoveries)} |")
    print(f"| servers started again | {restarts} |")
    if killer.recoveries:
        recoveries = sorted(killer.recoveries)
        middle = recoveries[len(recoveries) // 2]
        print(f"| from a kill to a right answer | {middle:.1f} s, at most {recoveries[-1]:.1f} s |")


def _print_usage(before: Usage, loaded: Sequence[Usage], after: Usage) -> None:
    print("\n| used | after the warm-up | at the end | most at a kill |\n|---|---|---|---|")
    for name in ("processes", "memory", "files", "threads", "temporary_files"):
        numbers = [getattr(each, name) for each in (before, after)]
        numbers.append(max((getattr(each, name) for each in loaded), default=0))
        if name == "memory":
            numbers = [f"{number >> 20} MB" for number in numbers]
        print(f"| {name.replace('_', ' ')} | {' | '.join(map(str, numbers))} |")


if __name__ == "__main__":
    sys.exit(main())
