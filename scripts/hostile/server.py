"""Send hostile requests to Cog's server: python -m scripts.hostile.server [GROUP...]

Prints a Markdown table: class of attack, cases, handled. A case is handled if it is answered or
refused as expected, in time and in bounded memory, an error names the input, and the next normal
request is right.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from scripts.hostile.address_cases import ADDRESSES, BEHAVIORS, HANGING, PRIVATE, hostile_server
from scripts.hostile.image_cases import image_cases
from scripts.hostile.input_cases import input_cases
from scripts.hostile.normal_requests import EXAMPLES
from scripts.hostile.process_usage import MemoryGuard
from scripts.hostile.protocol_cases import SLOTS, protocol_cases
from scripts.hostile.requests import SECONDS, Case, at_once, predict, problem
from scripts.local_server import LocalServer, serving

ROOT = Path(__file__).resolve().parents[2]
LOAD_SECONDS = 120.0
LARGEST_FILE = 256 << 20
FETCH_SECONDS = 2
PRIVATE_GROUP = "addresses: private"
ENVIRONMENT = {
    "XGENMM_MODEL": "demo",
    "XGENMM_DEVICE": "cpu",
    "XGENMM_FETCH_SECONDS": str(FETCH_SECONDS),
    "XGENMM_FETCH_BYTES": "10000000",
    "XGENMM_DECODE_SECONDS": "5",
}


@dataclass(frozen=True)
class Outcome:
    """How a case ended. `broken`: the next normal request was wrong."""

    case: Case
    problem: str
    broken: bool
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status is 1 if a case is not handled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="beginnings; default: all")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="to test another version")
    options = parser.parse_args(arguments)
    # A server that does not bound downloads must not fill the disk; Python ignores the signal.
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, hostile_server() as port:
        cases = [case for case in all_cases(port) if _selected(case, options.groups)]
        for private in (False, True):
            environment = ENVIRONMENT | {
                "XGENMM_PRIVATE_ADDRESSES": str(int(not private)),
                "TMPDIR": folder,
            }
            selected = [case for case in cases if (case.group == PRIVATE_GROUP) == private]
            for outcome in run_cases(selected, environment, options.checkout.resolve()):
                outcomes.append(outcome)
                if outcome.problem:
                    print(f"{outcome.case.group}, {outcome.case.name}: {outcome.problem}")
                    sys.stdout.flush()
    print(table(outcomes))
    return int(any(outcome.problem for outcome in outcomes))


def _selected(case: Case, groups: Sequence[str]) -> bool:
    return not groups or case.group.startswith(tuple(groups))


def all_cases(port: int) -> Iterator[Case]:
    """Yield all cases. port: of the server that hostile addresses lead to."""
    yield from image_cases()
    yield from input_cases()
    yield from address_cases(port)
    yield from protocol_cases()


def address_cases(port: int) -> Iterator[Case]:
    """Yield the cases of images by URL."""

    def case(group: str, name: str, url: str) -> Case:
        return Case(group, name, predict({"image": url, "max_new_tokens": 2}), names="image")

    for name in HANGING:
        url = f"http://127.0.0.1:{port}/{name}"
        yield case("addresses: hanging", name, url)
    drips = at_once(SLOTS, predict({"image": f"http://127.0.0.1:{port}/body drips"}))
    yield Case("addresses: hanging", f"{SLOTS} bodies drip", drips, names="image")
    for name in BEHAVIORS:
        yield case("addresses", name, f"http://127.0.0.1:{port}/{name}")
    for name, url in ADDRESSES.items():
        yield case("addresses", name, url)
    for name, url in PRIVATE.items():
        yield case(PRIVATE_GROUP, name, url.replace("PORT", str(port)))


def run_cases(
    cases: Iterable[Case], environment: Mapping[str, str], checkout: Path
) -> Iterator[Outcome]:
    """Run cases one by one, with a new server for each class and whenever one is broken."""
    for _, group in groupby(cases, key=lambda case: case.group):
        yield from _run_group(deque(group), environment, checkout)


def _run_group(
    waiting: deque[Case], environment: Mapping[str, str], checkout: Path
) -> Iterator[Outcome]:
    while waiting:
        with serving(environment, checkout) as server:
            server.wait_ready(LOAD_SECONDS)
            if wrong := EXAMPLES[0].wait_right(server.url, SECONDS):
                raise RuntimeError(f"a normal request fails: {wrong}")
            with MemoryGuard(server.process.pid) as guard:
                while waiting:
                    outcome = _run_case(waiting.popleft(), server, guard)
                    yield outcome
                    if outcome.broken:
                        break


def _run_case(case: Case, server: LocalServer, guard: MemoryGuard) -> Outcome:
    started = time.monotonic()
    wrong = outcome_of(case, server.url)
    seconds = time.monotonic() - started
    if seconds > SECONDS:
        wrong = wrong or f"took {seconds:.0f} s"
    broken = EXAMPLES[0].wait_right(server.url, case.recovery)
    problems = [wrong, broken and f"then {broken}", guard.exceeded()]
    return Outcome(case, "; ".join(filter(None, problems)), bool(broken), seconds)


def outcome_of(case: Case, url: str) -> str:
    """Send a case; returns what is wrong with the reply, or an empty text."""
    try:
        return problem(case, case.send(url))
    except TimeoutError:
        return f"no reply within {SECONDS:.0f} s"
    except OSError as error:
        return str(error)


def table(outcomes: Iterable[Outcome]) -> str:
    """Markdown: class of attack, cases, handled, and the longest time."""
    groups = defaultdict[str, list[Outcome]](list)
    for outcome in outcomes:
        groups[outcome.case.group].append(outcome)
        groups["all"].append(outcome)
    groups["all"] = groups.pop("all")
    lines = ["| class | cases | handled | longest |", "|---|---|---|---|"]
    for name, members in groups.items():
        handled = sum(not outcome.problem for outcome in members)
        longest = max(outcome.seconds for outcome in members)
        lines.append(f"| {name} | {len(members)} | {handled} | {longest:.1f} s |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
