"""What Cog 0.23 does not do by itself: cancel streams, and end when the worker has died.

Each part says when it can be removed; tests/test_cog_compat.py fails when that is the case.
"""

import asyncio
import logging
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SERVER_MODULE = b"cog.server.http"


def prediction_future() -> Future[None]:
    """Return a future that is cancelled when Cog cancels the prediction of the calling coroutine.

    coglet 0.23.1 exhausts an async generator before it sends anything, so `predict` is a coroutine
    that returns a plain generator, which coglet streams (`crates/coglet-python` in
    https://github.com/replicate/cog). Cog cancels a prediction by cancelling the future of that
    coroutine. By then the future is done, because the coroutine returned the generator at once, so
    the cancellation would be lost.

    Cog keeps the `concurrent.futures.Future` that `asyncio.run_coroutine_threadsafe` returned. The
    task has no public reference to it, but the done-callback that copies the task's result to it
    does, so it is found there and its `cancel` is replaced. Logs a warning if no such future is
    found, in which case the prediction cannot be cancelled.
    """
    cancelled: Future[None] = Future()
    task: Any = asyncio.current_task()
    found = False
    for callback, _ in task._callbacks or ():
        for cell in getattr(callback, "__closure__", None) or ():
            if isinstance(cell.cell_contents, Future):
                vars(cell.cell_contents)["cancel"] = cancelled.cancel
                found = True
    if not found:
        logger.warning(
            "cannot find the future by which Cog cancels this prediction, so cancelling has no "
            "effect; install Cog 0.23"
        )
    return cancelled


def watch_worker() -> subprocess.Popen[bytes] | None:
    """Start the watchdog that ends Cog's server after this process, its worker, has died.

    Returns the process, for `dismiss`, or None if the parent of this process is not Cog's server.
    Cog should end its server itself: https://github.com/replicate/cog, `run_event_loop` in
    `crates/coglet/src/orchestrator.rs`.
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
    # A forked process that outlives this one must not keep the pipe open.
    os.register_at_fork(after_in_child=watchdog.stdin.close)
    return watchdog


def dismiss(watchdog: subprocess.Popen[bytes]) -> None:
    """Let the server live on after this process, which is about to end by itself."""
    watchdog.communicate(b"-")
