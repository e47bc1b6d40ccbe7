"""Kill the worker of Cog's server under load, and measure when a new server answers right."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType

import psutil

from scripts.hostile.normal_requests import EXAMPLES
from scripts.hostile.process_usage import Meter, Usage
from scripts.local_server import LocalServer

LIFE_SECONDS = 10.0  # shortest; the supervisor gives up on servers that end sooner than that
LOST_SECONDS = 120.0  # after which a server that does not come back is given up


class Killer:
    """Counts requests and kills the worker, in a thread, when some of them are done.

    points: after how many requests each.
    recoveries: seconds from each kill to the first right answer.
    loaded: what the server used before each kill.
    """

    def __init__(self, server: LocalServer, points: Sequence[int], meter: Meter) -> None:
        self.recoveries: list[float] = []
        self.loaded: list[Usage] = []
        self._meter = meter
        self._server, self._points = server, points
        self._done = 0
        self._changed = threading.Condition()
        self._up = threading.Event()
        self._up.set()
        self._windows: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.join()

    def wait_up(self) -> None:
        """Wait until the server answers, as clients do that have seen it fail."""
        self._up.wait()

    def count(self) -> None:
        """One more request is done."""
        with self._changed:
            self._done += 1
            self._changed.notify_all()

    def killed_between(self, start: float, end: float) -> bool:
        """Whether the server was down at some time between these, of `time.monotonic`."""
        return any(start <= up and end >= down for down, up in self._windows)

    def _run(self) -> None:
        begun = time.monotonic()
        for point in self._points:
            with self._changed:
                while self._done < point:
                    self._changed.wait()
            time.sleep(max(0.0, begun + LIFE_SECONDS - time.monotonic()))
            begun = self._kill()

    def _kill(self) -> float:
        """Kill the worker; returns when a new server has answered."""
        victim = worker(self._server)
        self.loaded.append(self._meter.measure())
        killed = time.monotonic()
        self._windows.append((killed, float("inf")))
        self._up.clear()
        victim.kill()
        EXAMPLES[0].wait_right(self._server.url, LOST_SECONDS)
        recovered = time.monotonic()
        self._windows[-1] = killed, recovered
        self.recoveries.append(recovered - killed)
        self._meter.set_start()
        self._up.set()
        return recovered


def worker(server: LocalServer) -> psutil.Process:
    """The worker of a server that is ready."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = (process for process in processes if "_run_worker" in " ".join(process.cmdline()))
    return found
