"""Stop sequences in streamed text."""

from collections.abc import Sequence


class StopStringChecker:
    """Passes streamed text on until it contains one of the stop sequences.

    The stop sequence and everything after it are dropped, however the text is split. The sequence
    that ends first counts; of several that end at the same character, the longest. Text that may
    be the beginning of a stop sequence is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece of text; returns the text that can be passed on, possibly ""."""
        if self.stopped:
            return ""
        # Held-back text is shorter than the longest stop sequence, so the search is bounded.
        text = self._held + text
        matches = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if matches:
            self.stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        certain = self._partial_match(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text held back at the end of the answer; "" after a stop."""
        held, self._held = self._held, ""
        return held

    def _partial_match(self, text: str) -> int:
        """Where the longest tail of `text` starts that is the beginning of a stop sequence."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)
