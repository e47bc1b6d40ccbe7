"""Decode and tile untrusted image files in processes of their own, bounded in time and memory.

A header does not tell what a file costs: Pillow holds the GIL while it decodes JPEG 2000 and while
it walks through the markers of any format, and a fault in a codec ends the process. Here a file
that exceeds a limit ends a process that does nothing else, and no other request notices.

The processes exchange JSON and pixels, no pickles.
"""

import json
import os
import queue
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from xgenmm.config import TilingConfig
from xgenmm.errors import InputError
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.tiling import TiledImage, tile_image

STUCK_SECONDS = 300.0
"""A process that has not answered by then is killed, even if it uses no processor time."""


_TOO_LONG = "takes too long to decode; send fewer or smaller images, as plain JPEG or PNG"


@dataclass(frozen=True)
class DecodeLimits:
    """What decoding may take.

    seconds: of processor time, for the images of one request together.
    memory_bytes: address space of a process.
    processes: how many images are decoded at once; others wait.
    """

    seconds: float = 20.0
    memory_bytes: int = 3 << 30
    processes: int = min(os.cpu_count() or 1, 4)


class ImageDecoders:
    """Processes that decode and tile images. All methods may be called from any thread."""

    def __init__(
        self, tiling: TilingConfig, tile_size: int, limits: DecodeLimits | None = None
    ) -> None:
        self._limits = limits or DecodeLimits()
        self._settings = {
            "tiling": asdict(tiling),
            "tile_size": tile_size,
            "memory_bytes": self._limits.memory_bytes,
        }
        # The process used last is used next, so that no more are started than are needed.
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(self._limits.processes):
            self._idle.put(None)

    def start(self) -> None:
        """Start a process now rather than for the first image; does not wait for it."""
        with self._process():
            pass

    def reader(self) -> Callable[[bytes, str], TiledImage]:
        """A function that decodes the images of one request, which share its time.

        It takes the content of a file and the image's name in error messages, and raises InputError
        if the file is not an image or exceeds a limit. To be called by one thread at a time.
        """
        remaining = self._limits.seconds

        def read(content: bytes, name: str) -> TiledImage:
            nonlocal remaining
            if remaining <= 0:
                raise InputError(name, _TOO_LONG)
            with self._process() as process:
                header, pixels = process.call({"name": name, "seconds": remaining}, content)
            remaining -= header["seconds"]
            if header["error"] is not None:
                raise InputError(name, header["error"])
            array = np.frombuffer(pixels, np.uint8).reshape(header["shape"])
            width, height = header["image_size"]
            return TiledImage(array, header["columns"], header["rows"], (width, height))

        return read

    def close(self) -> None:
        """End the processes, waiting for those that are busy. They also end with this process."""
        for _ in range(self._limits.processes):
            if (process := self._idle.get()) is not None:
                process.end()

    @contextmanager
    def _process(self) -> Iterator["_Process"]:
        process = self._idle.get()
        try:
            if process is None or not process.running:
                process = _Process(self._settings)
            yield process
        finally:
            self._idle.put(process)


class _Process:
    """A process, from the side of its parent."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._popen = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import {__name__}; {__name__}.main()",
                    str(theirs.fileno()),
                ],
                # NumPy does no linear algebra here, but would reserve memory for it on each core.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "OPENBLAS_NUM_THREADS": "1",
                },
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of reach of Ctrl-C
            )
        _send(self._connection, settings)

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def call(self, request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        """Decode an image; returns the header of the answer and the pixels.

        Raises InputError if the process ends or has to be ended.
        """
        with suppress(EOFError, OSError):
            _send(self._connection, request)
            self._connection.send_bytes(content)
            if self._connection.poll(STUCK_SECONDS):
                return _receive(self._connection), self._connection.recv_bytes()
        status = self.end()
        problem = f"cannot be decoded (status {status}); send a plain JPEG or PNG"
        raise InputError(request["name"], _TOO_LONG if status == -signal.SIGPROF else problem)

    def end(self) -> int:
        """Kill the process unless it has ended; returns its status."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            return self._popen.wait(0.5)
        self._popen.kill()
        return self._popen.wait()


def main() -> None:
    """Decode images until the parent closes the connection, whose file descriptor is argument 1."""
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):
        settings = _receive(connection)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"], resource.RLIM_INFINITY))
        tiling = TilingConfig(**settings["tiling"])
        while True:
            request = _receive(connection)
            header, pixels = _answer(
                request, connection.recv_bytes(), tiling, settings["tile_size"]
            )
            _send(connection, header)
            connection.send_bytes(pixels)


def _answer(
    request: dict[str, Any], content: bytes, tiling: TilingConfig, tile_size: int
) -> tuple[dict[str, Any], bytes]:
    started, name = time.process_time(), request["name"]
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # ends the process by SIGPROF
    header: dict[str, Any] = {"error": None}
    pixels = b""
    try:
        tiled = tile_image(read_image(content, name), tiling, tile_size)
        pixels = tiled.pixels.tobytes()
        header |= {"shape": tiled.pixels.shape, "columns": tiled.columns, "rows": tiled.rows}
        header["image_size"] = tiled.image_size
    except InputError as error:
        header["error"] = str(error).removeprefix(f"{name}: ")
    signal.setitimer(signal.ITIMER_PROF, 0)
    header["seconds"] = time.process_time() - started
    return header, pixels


def _send(connection: Connection, content: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(content).encode())


def _receive(connection: Connection) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(connection.recv_bytes())
    return content
