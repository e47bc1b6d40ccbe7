"""What Cog 0.23 does not do by itself, for as long as it does not.

- A stream that a coroutine returned is not cancelled: `Prediction.cancelled`.
- The folder of a prediction stays on the disk: `Prediction`, `remove_old_folders`.
- The server outlives its worker: `set_up_watched`.
- A prediction whose folder cannot be made takes its slot for ever: `SlotWatch`.
- A file that a prediction returns stays on the disk: `SlotWatch`.

Cog's code is at https://github.com/replicate/cog. tests/serving/test_compat.py fails once it
streams async generators.
"""

import asyncio
import atexit
import contextvars
import http.client
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

SERVER_MODULE = b"cog.server.http"
FOLDERS = Path("/tmp/coglet/predictions")
OLD_SECONDS = 60.0
"""Folders of this age belong to no prediction that has yet to be handed to a worker."""

POLL_SECONDS = 3.0
LOST_SECONDS = 30.0


class Prediction:
    """Cog's prediction in whose coroutine it is created, until `close`.

    As a context manager it is closed at the end of the coroutine, unless that called
    `outlive_coroutine`.

    Attributes:
        running: all predictions that are not closed.
        cancelled: cancelled when Cog cancels the prediction after its coroutine has returned.
    """

    running: ClassVar["weakref.WeakSet[Prediction]"] = weakref.WeakSet()

    def __init__(self) -> None:
        self.cancelled: Future[None] = Future()
        self._outlives_coroutine = self._ended = False
        self.running.add(self)
        # Also when this object is collected: Cog may drop a generator without having started it.
        self._at_end: list[Callable[[], object]] = [
            weakref.finalize(self, _remove_folder, _prediction_folder())
        ]

    def at_end(self, function: Callable[[Any], object], argument: object) -> None:
        """Call a function at the end of the prediction, from any thread; at once if it has ended.

        Neither the function nor the argument may refer to this object.
        """
        call_once = weakref.finalize(self, function, argument)
        self._at_end.append(call_once)
        if self._ended:
            call_once()

    def close(self) -> None:
        """End the prediction: remove its folder and call what `at_end` was given."""
        self._ended = True
        self.running.discard(self)
        for call_once in list(self._at_end):
            call_once()

    def __enter__(self) -> "Prediction":
        return self

    def __exit__(self, *error: object) -> None:
        if not self._outlives_coroutine:
            self.close()

    def outlive_coroutine(self) -> None:
        """Make Cog cancel `cancelled` from now on. The coroutine calls this before it returns.

        coglet 0.23.1 exhausts an async generator before it sends anything, so `predict` is a
        coroutine that returns a plain generator, which coglet streams (`crates/coglet-python`).
        Cog cancels a prediction by cancelling the future of that coroutine. By then the future is
        done, because the coroutine returned the generator, so the cancellation would be lost.

        Cog keeps the `concurrent.futures.Future` that `asyncio.run_coroutine_threadsafe` returned.
        The task has no public reference to it, but the done-callback that copies the task's result
        to it does, so it is found there and its `cancel` is replaced. Logs a warning if no such
        future is found, in which case the prediction cannot be cancelled.
        """
        self._outlives_coroutine = True
        task: Any = asyncio.current_task()
        found = False
        for callback, _ in task._callbacks or ():
            for cell in getattr(callback, "__closure__", None) or ():
                if isinstance(cell.cell_contents, Future):
                    vars(cell.cell_contents)["cancel"] = self.cancelled.cancel
                    found = True
        if not found:
            logger.warning(
                "cannot find the future by which Cog cancels this prediction, so cancelling has "
                "no effect; install Cog 0.23"
            )


def _prediction_folder() -> Path | None:
    """The folder that Cog's server has made for the prediction of the calling coroutine.

    None if it is not below `FOLDERS`: the folder's name is the id, which may be any text. There is
    no public reference to the context variable with the id.
    """
    for variable, value in contextvars.copy_context().items():
        if variable.name == "_coglet_prediction_id" and value == Path(value).name:
            return FOLDERS / value
    return None


def remove_old_folders(folders: Path = FOLDERS, age: float = OLD_SECONDS) -> None:
    """Remove the folders of predictions that ended before `predict` or with their worker.

    Those of ids with a slash lie within each other.

    age: in seconds; younger ones stay.
    """
    old = []
    for path, _, _ in os.walk(folders, topdown=False):
        with suppress(OSError):  # removed meanwhile
            if time.time() - Path(path).stat().st_mtime > age and Path(path) != folders:
                old.append(Path(path))
    for folder in old:
        _remove_folder(folder)


def _remove_folder(folder: Path | None) -> None:
    """Remove the folder of a prediction, with its input if that was too long for a message."""
    if folder is None:
        return
    for part in ("inputs", "outputs"):
        with suppress(OSError):
            for file in (folder / part).glob("spill_*.json"):
                file.unlink()
            (folder / part).rmdir()
    with suppress(OSError):
        folder.rmdir()


def temporary_folder(kind: str) -> Path:
    """Return a new folder that is removed at the exit of this process.

    Also removes those of the same kind whose processes were killed.
    """
    prefix = f"xgenmm-{kind}-"
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        process = folder.name.removeprefix(prefix).partition("-")[0]
        if process == str(os.getpid()) or not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def set_up_watched(set_up: Callable[[], "SlotWatch"]) -> None:
    """Run the setup of a predictor; Cog's server ends after this process, its worker, has died.

    set_up: returns how the server's slots are to be watched from then on. If it raises, the server
        stays to report why. Without Cog's server nothing is watched.
    """
    watchdog = _watch_worker()
    try:
        slots = set_up()
    except Exception:
        if watchdog is not None:
            watchdog.communicate(b"-")  # dismisses it
        raise
    if watchdog is not None:
        threading.Thread(target=slots.run, name="xgenmm-slots", daemon=True).start()


def _watch_worker() -> subprocess.Popen[bytes] | None:
    """Start the watchdog; None if the parent of this process is not Cog's server.

    In Cog's `crates/coglet/src/orchestrator.rs`, `run_event_loop` ends, but not the server.
    """
    server = os.getppid()
    try:
        command = Path(f"/proc/{server}/cmdline").read_bytes().split(b"\0")
    except OSError:  # not Linux
        return None
    if SERVER_MODULE not in command:
        return None
    program = Path(__file__).with_name("watchdog.py")
    # In a session of its own, signals to the server's process group do not reach it.
    watchdog = subprocess.Popen(
        [sys.executable, "-I", program, str(server)], stdin=subprocess.PIPE, start_new_session=True
    )
    assert watchdog.stdin is not None
    # A forked process that outlives this one must not keep the pipe open. This reference keeps it
    # open here.
    os.register_at_fork(after_in_child=watchdog.stdin.close)
    return watchdog


@dataclass
class SlotWatch:
    """Notices that Cog's server is full without work for its worker.

    In coglet 0.23.1 a prediction keeps its slot for ever if its folder cannot be made, for example
    because its id has 300 characters (`predict` in `crates/coglet/src/service.rs`). Once all slots
    are lost the server refuses everything.

    Attributes:
        slots: how many predictions the server admits.
        patience: seconds after which slots count as lost. The server is also full without work for
            its worker while it uploads a result.
        results: folder of files that predictions have returned. What is in it is removed whenever
            the server has a free slot, which it has once it has read the files.
        since: when the server began to be full while at most half of its slots were in use.
    """

    slots: int
    patience: float = LOST_SECONDS
    results: Path | None = None
    since: float | None = None

    def lost(self, status: str | None, running: int, now: float) -> bool:
        """Whether slots have been lost for `patience` seconds.

        Args:
            status: of the server's health check, None if it does not answer.
            running: number of predictions in the worker.
            now: in seconds.
        """
        if status != "BUSY" or 2 * running > self.slots:
            self.since = None
            return False
        self.since = now if self.since is None else self.since
        return now - self.since >= self.patience

    def run(self) -> None:
        """Watch the server and remove old folders; end this process if slots are lost."""
        while True:
            # Listed before the server is asked: what comes later may not have been read yet.
            results = list(self.results.iterdir()) if self.results else []
            status = _server_status()
            if self.lost(status, len(Prediction.running), time.monotonic()):
                break
            for result in results if status == "READY" else ():
                shutil.rmtree(result, ignore_errors=True)
            time.sleep(POLL_SECONDS)
            remove_old_folders()
        logger.error("Cog's server has lost slots, so it has to start again")
        os._exit(1)


def _server_status() -> str | None:
    port = int(os.environ.get("PORT") or 5000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health-check")
        status: str = json.loads(connection.getresponse().read())["status"]
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return None
    finally:
        connection.close()
    return status
