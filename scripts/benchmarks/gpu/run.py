"""Runs the stages in a process of their own, so that no stage can spoil another.

A stage that fails ends its process: after a CUDA error nothing else works in it. A stage that hangs
or exceeds its time is killed. The next stage then gets a new process. Each figure is passed on as
soon as it is measured, and no stage starts after the budget.
"""

import faulthandler
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from scripts.benchmarks.gpu.figures import GOALS, Figure, Goal, Record, Skipped
from scripts.benchmarks.report import Options, Row, format_figure

if TYPE_CHECKING:
    from scripts.benchmarks.gpu.context import Context

logger = logging.getLogger(__name__)

BUDGET = 450.0
START_SECONDS = 60.0
LEAST_SECONDS = 5.0
IDLE_SECONDS = 2.0  # until a process that should end gets a signal
STOP_SECONDS = 15.0  # until it is killed; Cog's server needs 10


@dataclass(frozen=True)
class Stage:
    """A function `(Context) -> Iterator[Figure]` in `module`, with the name of the stage.

    module: imported when the stage starts, so that a missing package fails this stage only.
    seconds: the most that it may take.
    """

    name: str
    module: str
    seconds: float


_PACKAGE = "scripts.benchmarks.gpu"
STAGES = (
    Stage("limits", f"{_PACKAGE}.limits", 30),
    Stage("kernels", f"{_PACKAGE}.kernels", 120),
    Stage("self_check", f"{_PACKAGE}.decode", 60),
    Stage("decode", f"{_PACKAGE}.decode", 60),
    Stage("prefill", f"{_PACKAGE}.decode", 60),
    Stage("vision", f"{_PACKAGE}.vision", 60),
    Stage("engine", f"{_PACKAGE}.engine", 120),
    Stage("loading", f"{_PACKAGE}.loading", 120),
    Stage("server", f"{_PACKAGE}.server", 120),
    Stage("transformers", f"{_PACKAGE}.baseline", 180),
)


class StageError(Exception):
    """A stage failed and its process is of no more use. Arguments: message, traceback."""


def run(stages: Sequence[Stage], *, tiny: bool = False, budget: float = BUDGET) -> Iterator[Record]:
    """Run stages and yield what they measure.

    tiny: on a tiny model, whose figures mean nothing. budget: in seconds.

    Yields {"machine"} first. A figure is {"stage", "measured", "value", "unit", "details"}; a stage
    ends with {"stage", "seconds"}, {"stage", "skipped"} or {"stage", "error"}.
    """
    end = time.monotonic() + budget
    worker: _Worker | None = None
    try:
        for stage in stages:
            if end - time.monotonic() < LEAST_SECONDS:
                yield {"stage": stage.name, "skipped": f"no time left of {budget:g} s"}
                continue
            try:
                if worker is None:
                    worker = _Worker(tiny)
                    yield from worker.start(min(START_SECONDS, end - time.monotonic()))
                yield from worker.run(stage, min(stage.seconds, end - time.monotonic()))
            except StageError as error:
                message, *frames = error.args
                yield {"stage": stage.name, "error": message, "traceback": "".join(frames)}
                if worker is not None:
                    worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()


def gpu(options: Options) -> Iterator[Row]:
    """The part `gpu` of `python -m scripts.benchmarks`; failed stages are logged."""
    for record in run(STAGES, tiny=options.tiny):
        if "value" in record:
            yield row(record)
        elif "error" in record:
            logger.error("%s: %s", record["stage"], record["traceback"] or record["error"])


def row(record: Record) -> Row:
    """A figure as the row of a table, with its goal."""
    goal = GOALS.get((record["stage"], record["measured"]), Goal(record["unit"]))
    details = ", ".join(format_figure(value, unit) for unit, value in record["details"].items())
    measured = f"{record['measured']} ({details})" if details else record["measured"]
    value, unit = record["value"], record["unit"]
    return Row(record["stage"], measured, value, unit, goal.at_least, goal.at_most)


class _Worker:
    """A process that runs one stage after the other."""

    def __init__(self, tiny: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, tiny))
        self._process.start()
        theirs.close()

    def start(self, seconds: float) -> Iterator[Record]:
        """Wait until the process is ready; yields the machine."""
        yield from self._receive(seconds, "starting")

    def run(self, stage: Stage, seconds: float) -> Iterator[Record]:
        """Run a stage for at most `seconds`. Raises StageError if it fails."""
        started = time.monotonic()
        self._connection.send(stage)
        yield from self._receive(seconds, "it")
        yield {"stage": stage.name, "seconds": round(time.monotonic() - started, 1)}

    def _receive(self, seconds: float, what: str) -> Iterator[Record]:
        end = time.monotonic() + seconds
        while True:
            try:
                if not self._connection.poll(max(0.0, end - time.monotonic())):
                    os.kill(self._process.pid or 0, signal.SIGUSR1)  # prints where it hangs
                    raise StageError(f"{what} took longer than {seconds:.0f} s")
                record = self._connection.recv()
            except (EOFError, ConnectionError):
                self._process.join()
                raise StageError(
                    f"the process died with exit status {self._process.exitcode}"
                ) from None
            if record is None:
                return
            if isinstance(record, StageError):
                raise record
            yield record

    def stop(self) -> None:
        """End the process, which first ends those that it has started."""
        self._connection.close()  # ends an idle process
        self._process.join(IDLE_SECONDS)
        self._process.terminate()
        self._process.join(STOP_SECONDS)
        self._process.kill()
        self._process.join()


def _work(connection: Connection, tiny: bool) -> None:
    """The main function of the process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    from scripts.benchmarks.gpu.context import Context
    from scripts.benchmarks.report import machine

    with Context(tiny) as context:
        connection.send({"machine": machine()})
        connection.send(None)
        while _run_next_stage(connection, context):
            gc.collect()
            if context.device.cuda:
                torch.cuda.empty_cache()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends now; let it delete its files


def _run_next_stage(connection: Connection, context: "Context") -> bool:
    """Returns whether the process can run another stage."""
    try:
        stage = connection.recv()
    except EOFError:
        return False
    try:
        module = importlib.import_module(stage.module)
        function: Callable[[Context], Iterator[Figure]] = getattr(module, stage.name)
        for figure in function(context):
            connection.send({"stage": stage.name, **figure.record()})
    except Skipped as reason:
        connection.send({"stage": stage.name, "skipped": str(reason)})
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        connection.send(StageError(message, traceback.format_exc()))
        return False
    connection.send(None)
    return True
