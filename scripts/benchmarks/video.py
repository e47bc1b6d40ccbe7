"""The part `video`: frames of a clip by seeking against decoding everything, as the authors do."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.report import Options, Row
from xgenmm import read_video
from xgenmm.preprocessing.frame_indices import frame_indices

FRAMES, WIDTH, HEIGHT, NUM_FRAMES = 900, 1280, 720, 8


def video(options: Options) -> list[Row]:
    """Measure 8 frames of a clip of 30 s in H.264, with x264's own choice of key frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        _encode(path)
        ways: dict[str, Callable[[Path], list[NDArray[np.uint8]]]] = {
            "by seeking": _seek,
            "decoding and converting everything": _decode_everything,
            "decoding everything, converting 8": _convert_some,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        results = {}
        for _ in range(options.rounds):
            for way, read in ways.items():
                started = time.perf_counter()
                results[way] = read(path)
                seconds[way].append(time.perf_counter() - started)
    rows = [Row("video", way, min(each), "s") for way, each in seconds.items()]
    sought, *others = ways
    for way in others:
        ratio = statistics.median(b / a for a, b in zip(seconds[sought], seconds[way], strict=True))
        goal = 2 if way == others[0] else None
        rows.append(Row("video", f"times as fast as {way}", ratio, "x", at_least=goal))
    same = all(np.array_equal(results[sought], results[way]) for way in others)
    rows.append(Row("video", "same pixels", 100.0 * same, "%", at_least=100))
    return rows


def _encode(path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    pattern = blocks.repeat(16, 0).repeat(16, 1)
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(FRAMES):
            moved = np.roll(pattern, (2 * i, 3 * i), (0, 1))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(moved)))
        output.mux(stream.encode())


def _seek(path: Path) -> list[NDArray[np.uint8]]:
    return [np.asarray(frame) for frame in read_video(path, NUM_FRAMES).frames]


def _decode_everything(path: Path) -> list[NDArray[np.uint8]]:
    """As `torchvision.io.read_video` does."""
    with av.open(path) as container:
        frames = [_to_rgb(frame) for frame in container.decode(video=0)]
    return [frames[index] for index in frame_indices(len(frames), NUM_FRAMES)]


def _convert_some(path: Path) -> list[NDArray[np.uint8]]:
    wanted = set(frame_indices(FRAMES, NUM_FRAMES))
    with av.open(path) as container:
        every = enumerate(container.decode(video=0))
        return [_to_rgb(frame) for i, frame in every if i in wanted]


def _to_rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    rgb: NDArray[np.uint8] = frame.reformat(format="rgb24", src_colorspace="ITU601").to_ndarray()
    return rgb
