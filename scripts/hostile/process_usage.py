"""What the processes of a server use: memory, open files, threads, temporary files."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

from serving.compat import FOLDERS

MOST_MEMORY = 5 << 30
PERIOD_SECONDS = 0.2


@dataclass(frozen=True)
class Usage:
    """Sums over the processes of a server.

    memory: in bytes, beyond that after the start of the server, which depends on how much of the
        machine's memory is free then.
    """

    processes: int
    memory: int
    files: int
    threads: int
    temporary_files: int

    def is_within(self, other: "Usage", growth: "Usage") -> bool:
        """Whether nothing is more than in `other` by more than `growth`."""
        rows = zip(astuple(self), astuple(other), astuple(growth), strict=True)
        return all(mine <= its + more for mine, its, more in rows)


class Meter:
    """Measures what a server uses.

    server: process id of its supervisor.
    folder: its TMPDIR.
    """

    def __init__(self, server: int, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._since = time.time()
        self.set_start()

    def set_start(self) -> None:
        """The server has just started; its memory counts from here."""
        self._start = _processes_usage(self._server).memory

    def measure(self) -> Usage:
        """What the server uses now."""
        used = _processes_usage(self._server)
        return replace(
            used, memory=used.memory - self._start, temporary_files=self._temporary_files()
        )

    def _temporary_files(self) -> int:
        """Number of files and folders of the server and, new ones only, of Cog."""
        count = sum(len(folders) + len(files) for _, folders, files in os.walk(self._folder))
        for path, folders, files in os.walk(FOLDERS):
            for name in (*folders, *files):
                with suppress(OSError):  # removed meanwhile
                    count += (Path(path) / name).lstat().st_mtime > self._since
        return count


def _processes_usage(server: int) -> Usage:
    found = [Usage(0, 0, 0, 0, 0)]
    for process in _tree(server):
        try:
            with process.oneshot():
                memory = process.memory_full_info().uss  # not shared with other processes
                sizes = memory, process.num_fds(), process.num_threads()
        except psutil.Error:  # it has ended
            continue
        found.append(Usage(1, *sizes, temporary_files=0))
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
