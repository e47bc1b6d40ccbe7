"""What the processes of a server use: memory, open files, threads."""

import threading
from contextlib import suppress
from dataclasses import astuple, dataclass
from types import TracebackType

import psutil

MOST_MEMORY = 5 << 30
PERIOD_SECONDS = 0.2


@dataclass(frozen=True)
class Usage:
    """Sums over the processes of a server. memory: resident, in bytes."""

    processes: int
    memory: int
    files: int
    threads: int


def usage(server: int) -> Usage:
    """What a process and its descendants use now."""
    found = []
    for process in _tree(server):
        try:
            with process.oneshot():
                sizes = process.memory_info().rss, process.num_fds(), process.num_threads()
        except psutil.Error:  # it has ended
            continue
        found.append(Usage(1, *sizes))
    return Usage(*map(sum, zip(*map(astuple, found), strict=True)))


def _tree(server: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(server)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


class MemoryGuard:
    """Kills all processes of a server, in a thread, when they use too much memory."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._stopped = threading.Event()
        self._exceeded = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryGuard":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def exceeded(self) -> str:
        """What was wrong since the last call, or an empty text."""
        exceeded = self._exceeded.is_set()
        self._exceeded.clear()
        return f"took more than {MOST_MEMORY >> 30} GB" if exceeded else ""

    def _watch(self) -> None:
        while not self._stopped.wait(PERIOD_SECONDS):
            processes = _tree(self._server)
            if sum(_resident(process) for process in processes) > MOST_MEMORY:
                self._exceeded.set()
                for process in processes:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
