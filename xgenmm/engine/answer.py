"""The text of one answer as a stream, for the caller of `Engine.stream`."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from xgenmm.engine.request import ChoiceScore, StopReason, Usage
from xgenmm.engine.stop_strings import StopStringChecker
from xgenmm.preprocessing.tokenizer import Tokenizer


class Answer:
    """An answer that is being generated: iterate over its text once, with `for` or `async for`.

    If the request fails, the iteration raises the error. `usage` is complete when it ends, and so
    is `choice_scores`: the score of each choice, if the request had choices.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        stops: Sequence[str],
        choices: Sequence[str],
    ) -> None:
        self.usage = Usage()
        self.choice_scores: dict[str, ChoiceScore] = {}
        self._detokenizer = tokenizer.detokenizer()
        self._stop_checker = StopStringChecker(stops)
        self._end_ids = end_ids
        self._special_ids = frozenset(tokenizer.specials.values())
        self._choices = choices
        self._items: SimpleQueue[str | Exception | None] = SimpleQueue()
        self._wake: Callable[[], object] = lambda: None
        self._cancelled = threading.Event()
        self._ended = threading.Event()

    def __iter__(self) -> Iterator[str]:
        while (item := _raise_error(self._items.get())) is not None:
            if not self.cancelled:
                yield item

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed, so nothing waits in it
                loop.call_soon_threadsafe(ready.set)

        self._wake = wake
        while True:
            try:
                item = _raise_error(self._items.get_nowait())
            except Empty:
                await ready.wait()
                ready.clear()
                continue
            if item is None:
                return
            if not self.cancelled:
                yield item

    def pieces(self, interval: float) -> Iterator[str]:
        """Iterate over the text in fewer, longer pieces, for callers to whom each one is costly.

        The first piece is yielded at once. After each piece, text is joined for `interval`
        seconds or until the answer ends. Text that precedes an error is yielded before it is
        raised. Generating a token does not wake up the caller's thread during the interval.
        """
        ended = False
        while not ended:
            items = [self._items.get(), *self._waiting_items()]
            ended = not isinstance(items[-1], str)
            text = "".join(item for item in items if isinstance(item, str))
            due = time.monotonic() + interval
            if text and not self.cancelled:
                yield text
            _raise_error(items[-1])
            self._ended.wait(due - time.monotonic())

    def _waiting_items(self) -> Iterator[str | Exception | None]:
        with suppress(Empty):
            while True:
                yield self._items.get_nowait()

    def text(self) -> str:
        """Wait for the whole answer and return it. Raises the error if the request fails."""
        # Waking up for every piece of text would slow down the engine's thread.
        self._ended.wait()
        return "".join(self)

    def cancel(self) -> None:
        """Stop generating; the iteration ends before the next token. May be called from
        any thread."""
        self._cancelled.set()

    # The methods of an `OutputSink`.

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def token(self, token_id: int) -> StopReason | None:
        """Pass on the token's text. Returns the stop reason if it completes the answer."""
        if token_id in self._end_ids:
            return "end"
        # Special tokens in the middle of an answer are not text.
        if token_id not in self._special_ids:
            self._put(self._stop_checker.push(self._detokenizer.push(token_id)))
        return "stop" if self._stop_checker.stopped else None

    def chosen(self, index: int, scores: Sequence[ChoiceScore]) -> None:
        """Pass on a choice as the whole answer."""
        self.choice_scores = dict(zip(self._choices, scores, strict=True))
        best = scores[index].log_probability
        weights = [math.exp(score.log_probability - best) for score in scores]
        shares = [weight / sum(weights) for weight in weights]
        self.usage.choices = dict(zip(self._choices, shares, strict=True))
        self._put(self._choices[index])

    def end(self, reason: StopReason, error: Exception | None) -> None:
        """Pass on the text that was held back, and end the iteration."""
        if reason in ("end", "length"):
            text = self._stop_checker.push(self._detokenizer.flush())
            self._put(text + self._stop_checker.flush())
        self._items.put(error)
        self._ended.set()
        self._wake()

    def _put(self, text: str) -> None:
        if text:
            self._items.put(text)
            self._wake()


def _raise_error(item: str | Exception | None) -> str | None:
    if isinstance(item, Exception):
        raise item
    return item
