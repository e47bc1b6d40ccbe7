"""Decode and tile untrusted images and videos in processes bounded in time and memory.

A header does not tell what a file costs: Pillow holds the GIL while it decodes JPEG 2000 and while
it walks through the markers of any format, and a fault in a codec, of images or videos, ends the
process. Here a file that exceeds a limit ends a process that does nothing else, and no other
request notices.

The processes exchange JSON and pixels, no pickles.
"""

import json
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from xgenmm.config import TilingConfig, TilingMode
from xgenmm.errors import InputError
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.tiling import TiledImage, tile_image
from xgenmm.preprocessing.video import FrameSelection, Video, decode_video
from xgenmm.preprocessing.video_decoder import VideoLimits, too_many_bytes, too_slow

STUCK_SECONDS = 300.0
"""A process that has not answered by then is killed, even if it uses no processor time."""


_TOO_LONG = "takes too long to decode; send fewer or smaller images, as plain JPEG or PNG"
_PLAIN_IMAGE, _PLAIN_VIDEO = "a plain JPEG or PNG", "an H.264 MP4"


@dataclass(frozen=True)
class DecodeLimits:
    """What decoding may take.

    seconds: of processor time, for the images of one request together.
    memory_bytes: address space of a process.
    processes: how many images or videos are decoded at once; others wait.
    video: for each video.
    """

    seconds: float = 20.0
    memory_bytes: int = 3 << 30
    processes: int = min(os.cpu_count() or 1, 4)
    video: VideoLimits = field(default_factory=VideoLimits)


class ImageDecoders:
    """Processes that decode and tile images and the frames of videos.

    All methods may be called from any thread.
    """

    def __init__(
        self, tiling: TilingConfig, tile_size: int, limits: DecodeLimits | None = None
    ) -> None:
        self._limits = limits or DecodeLimits()
        self._settings = {
            "tiling": asdict(tiling),
            "tile_size": tile_size,
            "memory_bytes": self._limits.memory_bytes,
            "video_limits": asdict(self._limits.video),
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
            request = {"name": name, "seconds": remaining}
            with self._process() as process:
                header, pixels = process.call(request, content, _TOO_LONG, _PLAIN_IMAGE)
            remaining -= header["seconds"]
            if header["error"] is not None:
                raise InputError(header["input"], header["error"])
            return _unpack(header["images"], pixels)[0]

        return read

    def read_video(
        self,
        content: bytes,
        name: str = "video",
        selection: FrameSelection | None = None,
        mode: TilingMode | None = None,
    ) -> Video[TiledImage]:
        """Take frames from the content of a video file and tile each like an image.

        mode: see `TilingConfig`; None is the configured one.

        Raises InputError as `read_video` does, and if the video exceeds a limit.
        """
        limits = self._limits.video
        selection = selection or FrameSelection()
        selection.check()
        if len(content) > limits.file_bytes:
            raise InputError(name, too_many_bytes(limits))
        request = {"name": name, "seconds": limits.seconds, "video": asdict(selection)}
        with self._process() as process:
            header, pixels = process.call(
                request | {"mode": mode}, content, too_slow(limits), _PLAIN_VIDEO
            )
        if header["error"] is not None:
            raise InputError(header["input"], header["error"])
        frames = _unpack(header["images"], pixels)
        return Video(
            tuple(frames), tuple(header["times"]), tuple(header["indices"]), header["total"]
        )

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

    def call(
        self, request: dict[str, Any], content: bytes, too_slow: str, plain: str
    ) -> tuple[dict[str, Any], bytes]:
        """Decode a file; returns the header of the answer and the pixels.

        Raises InputError if the process ends or has to be ended: because of the time with the
        message `too_slow`, else with the advice to send `plain`.
        """
        with suppress(EOFError, OSError):
            _send(self._connection, request)
            self._connection.send_bytes(content)
            if self._connection.poll(STUCK_SECONDS):
                return _receive(self._connection), self._connection.recv_bytes()
        status = self.end()
        problem = f"cannot be decoded (status {status}); send {plain}"
        raise InputError(request["name"], too_slow if status == -signal.SIGPROF else problem)

    def end(self) -> int:
        """Kill the process unless it has ended; returns its status."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            return self._popen.wait(0.5)
        self._popen.kill()
        return self._popen.wait()


def main() -> None:
    """Decode files until the parent closes the connection, whose file descriptor is argument 1."""
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):
        settings = _receive(connection)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"], resource.RLIM_INFINITY))
        while True:
            request = _receive(connection)
            header, pixels = _answer(request, connection.recv_bytes(), settings)
            _send(connection, header)
            connection.send_bytes(pixels)


def _answer(
    request: dict[str, Any], content: bytes, settings: dict[str, Any]
) -> tuple[dict[str, Any], bytes]:
    started, name = time.process_time(), request["name"]
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # ends the process by SIGPROF
    header: dict[str, Any] = {"error": None}
    pixels = b""
    try:
        if "video" in request:
            video = _tile_video(request, content, settings)
            header |= {"times": video.times, "indices": video.indices, "total": video.total}
            tiled = video.frames
        else:
            tiling = TilingConfig(**settings["tiling"])
            tiled = (tile_image(read_image(content, name), tiling, settings["tile_size"]),)
        pixels = b"".join(image.pixels.data for image in tiled)
        header["images"] = [
            (image.pixels.shape, image.columns, image.rows, image.image_size) for image in tiled
        ]
    except InputError as error:
        header["input"] = error.name
        header["error"] = str(error).removeprefix(f"{error.name}: ")
    except MemoryError:
        header |= {"input": name, "error": "takes too much memory to decode; make it smaller"}
    signal.setitimer(signal.ITIMER_PROF, 0)
    header["seconds"] = time.process_time() - started
    return header, pixels


def _tile_video(
    request: dict[str, Any], content: bytes, settings: dict[str, Any]
) -> Video[TiledImage]:
    tiling = TilingConfig(**settings["tiling"])
    if request["mode"] is not None:
        tiling = replace(tiling, mode=request["mode"])
    return decode_video(
        content,
        lambda image: tile_image(image, tiling, settings["tile_size"]),
        FrameSelection(**request["video"]),
        VideoLimits(**settings["video_limits"]),
        request["name"],
    )


def _unpack(images: list[Any], pixels: bytes) -> list[TiledImage]:
    """The tiled images that `_answer` described and joined."""
    tiled, offset = [], 0
    for shape, columns, rows, (width, height) in images:
        array = np.frombuffer(pixels, np.uint8, math.prod(shape), offset).reshape(shape)
        offset += array.nbytes
        tiled.append(TiledImage(array, columns, rows, (width, height)))
    return tiled


def _send(connection: Connection, content: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(content).encode())


def _receive(connection: Connection) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(connection.recv_bytes())
    return content
