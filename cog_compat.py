"""Workaround for Cog 0.23: make cancelling reach a prediction that streams from a plain generator.

coglet 0.23.1 exhausts an async generator before it sends anything, so `predict` is a
coroutine that returns a plain generator, which coglet streams (`crates/coglet-python` in
https://github.com/replicate/cog). Cog cancels a prediction by cancelling the future of that
coroutine. By then the future is done, because the coroutine returned the generator at once, so
the cancellation would be lost.

Remove this module once Cog streams async generators.
"""

import asyncio
import logging
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger(__name__)


def prediction_future() -> Future[None]:
    """Return a future that is cancelled when Cog cancels the prediction of the calling coroutine.

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
