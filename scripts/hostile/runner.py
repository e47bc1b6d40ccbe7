"""Run `xgenmm caption` on hostile input, in a bounded time, and judge how it ended."""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet

PRELOAD = ["xgenmm.captioning.program", "xgenmm.engine.load"]
MAX_MEMORY_BYTES = 6 << 30  # the KV cache takes up to 4 GB on a CPU
MAX_ERROR_CHARS = 2000

Arguments = list[str]


@dataclass(frozen=True)
class Case:
    """One hostile dataset.

    group: the class of attack.
    build: writes files into a folder and returns the arguments of `xgenmm caption`; OUTPUT is `out`
        in that folder.
    rows: expected number of rows; None if only a refusal is right.
    errors: how many of them have an error; None if any number is right.
    names: what a refusal must contain, such as the name of the file; empty if only rows are right.
    """

    group: str
    name: str
    build: Callable[[Path], Arguments]
    rows: int | None = None
    errors: int | None = 1
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `problem` is empty if it was handled."""

    case: Case
    problem: str
    seconds: float
    memory: int
    folder: Path


def run_case(case: Case, parent: Path, seconds: float) -> Outcome:
    """Build a case in a new folder and run it for at most `seconds`."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    arguments = ["caption", *case.build(folder), "-o", str(folder / "out")]
    arguments += ["--max-new-tokens", "2"]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_program, args=(arguments, str(folder / "log")))
    started = time.monotonic()
    process.start()
    memory = _wait(process, started + seconds)
    elapsed = time.monotonic() - started
    if process.exitcode is None:
        process.kill()
        process.join()
        problem = f"still running after {seconds:.0f} s"
    elif memory > MAX_MEMORY_BYTES:
        problem = f"takes {memory >> 20} MB"
    else:
        log = (folder / "log").read_text(errors="replace")
        problem = judge(case, process.exitcode, log, folder / "out")
    return Outcome(case, problem, elapsed, memory, folder)


def start_forkserver(package: Path) -> None:
    """Import the checkout to be tested, once, in the process that all cases are forked from."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(package), str(Path(__file__).parents[2])])
    os.chdir(package)
    own_modules = [name for name in sys.modules if name.startswith("scripts.hostile.")]
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD + own_modules)


def run_program(arguments: Sequence[str], log: str) -> None:
    """Run `xgenmm` in this process; its output goes to a file, its status is the process's."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(import_module("xgenmm.__main__").main(arguments))


def judge(case: Case, status: int, log: str, output: Path) -> str:
    """Return what was wrong with the way a case ended, or an empty text."""
    if "Traceback" in log:
        return "traceback: " + last_line(log)[:200]
    if status < 0:
        return f"killed by signal {-status}"
    if status == 0:
        if case.rows is None:
            return "accepted, not refused"
        return _judge_rows(case, output)
    line = last_line(log)
    if status != 1 or (case.rows is not None and not case.names):
        return f"status {status}: {line[:200]}"
    if missing := [name for name in case.names if name not in line]:
        return f"refused without naming {missing}: {line[:200]}"
    return "" if len(line) <= MAX_ERROR_CHARS else f"an error of {len(line)} characters"


def _judge_rows(case: Case, output: Path) -> str:
    rows = read_rows(output)
    keys = {(row["id"], row["question"]) for row in rows}
    errors = [row["error"] for row in rows if row["error"] is not None]
    if len(rows) != case.rows:
        return f"{len(rows)} rows, not {case.rows}"
    if len(keys) != len(rows):
        return "two rows have the same id"
    if case.errors not in (None, len(errors)):
        return f"{len(errors)} rows with an error, not {case.errors}: {str(errors)[:200]}"
    if (longest := max(map(len, errors), default=0)) > MAX_ERROR_CHARS:
        return f"an error of {longest} characters"
    return ""


def read_rows(output: Path) -> list[dict[str, Any]]:
    """All rows of OUTPUT."""
    rows: list[dict[str, Any]] = []
    for path in output.glob("part-*"):
        if path.suffix == ".parquet":
            rows += pyarrow.parquet.ParquetFile(path).read().to_pylist()
        else:
            rows += map(json.loads, path.read_text().splitlines())
    return rows


def last_line(log: str) -> str:
    """The last line that the program printed."""
    lines = [line for line in log.replace("\r", "\n").split("\n") if line.strip()]
    return lines[-1] if lines else ""


def _wait(process: BaseProcess, deadline: float) -> int:
    """Wait for a process until a deadline; return the most memory it used, in bytes."""
    memory = 0
    while process.is_alive() and time.monotonic() < deadline and memory <= MAX_MEMORY_BYTES:
        memory = max(memory, _peak_memory(process.pid or 0))
        process.join(0.02)
    if memory > MAX_MEMORY_BYTES:
        process.kill()
        process.join()
    return memory


def _peak_memory(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) << 10 if found else 0
