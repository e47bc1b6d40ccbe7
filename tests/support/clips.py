"""Short clips, encoded by the tests, and files that are no clip or a bad one."""

import io
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

PIXELS = NDArray[np.uint8]
B_FRAMES = {"bf": "3", "g": "20"}


def moving_blocks(count: int, width: int, height: int) -> list[PIXELS]:
    """RGB frames of a random pattern that moves, each with a stripe of a color of its own."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pattern = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    frames = [np.roll(pattern, (3 * i, 2 * i), (0, 1)) for i in range(count)]
    for i, frame in enumerate(frames):
        frame[:16] = 7 * i % 256
    return frames


def clip(
    container: str = "mp4",
    codec: str = "libx264",
    count: int = 60,
    size: tuple[int, int] = (96, 64),
    *,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
    **settings: Any,
) -> bytes:
    """Encode moving blocks.

    options: of the codec; settings: attributes of its context.
    milliseconds: the time of each frame; the default is 25 frames a second.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for i, array in enumerate(moving_blocks(count, *size)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format=pixels, threads=1)
            frame.pts = i
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def large_frame(declared: tuple[int, int]) -> bytes:
    """An 8K frame in a file that declares another size."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt = 7680, 4320, "yuvj420p"
    codec.time_base = 1
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = *declared, "yuvj420p"
        for packet in [*codec.encode(av.VideoFrame(7680, 4320, "yuvj420p")), *codec.encode()]:
            packet.stream = stream
            output.mux(packet)
    return file.getvalue()


def decode_everything(content: bytes) -> list[PIXELS]:
    """Every frame as RGB by BT.601, as in the authors' script with PyAV 12."""
    with av.open(io.BytesIO(content)) as container:
        return [
            frame.reformat(
                format="rgb24",
                src_colorspace="ITU601",
                src_color_range=source_range(frame),
                threads=1,
            ).to_ndarray()
            for frame in container.decode(video=0)
        ]


def source_range(frame: av.VideoFrame) -> str | None:
    """Old versions of PyAV take the range from the pixel format, and ignore the file's tag."""
    return "MPEG" if frame.format.name == "yuv420p" else None


def silence() -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    frame.rate = 8000
    return frame


def audio(container: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=8000, layout="mono")
        output.mux(stream.encode(silence()))
        output.mux(stream.encode())
    return file.getvalue()


def no_frames() -> bytes:
    """An MP4 whose table of samples is empty."""
    content = clip(count=1)
    for table, offset in ((b"stts", 8), (b"stsz", 12), (b"stco", 8), (b"stsc", 8)):
        place = content.index(table) + offset
        content = content[:place] + bytes(4) + content[place + 4 :]
    return content


def declared_as_days() -> bytes:
    content = clip("matroska")
    place = content.index(b"\x44\x89\x88") + 3  # Duration, a float of 8 bytes, in milliseconds
    return content[:place] + struct.pack(">d", 3 * 86_400_000) + content[place + 8 :]


def cut(content: bytes) -> bytes:
    return content[: len(content) * 6 // 10]


def unknown_codec() -> bytes:
    return clip().replace(b"avc1", b"xyz1").replace(b"avcC", b"xyzC")


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"hello " * 100, "is not a video or is damaged; send MP4, WebM"),
    "empty": (lambda: b"", "the file is empty; send a video"),
    "audio": (lambda: audio("wav", "pcm_f32le"), "is not a video or is damaged; send MP4, WebM"),
    "audio in MP4": (lambda: audio("mp4", "aac"), "has no video stream; send a file with a video"),
    "MP4 without its end": (lambda: cut(clip()), "is not a video or is damaged"),
    "WebM without its end": (lambda: cut(clip("webm", "libvpx-vp9")), "is cut short or damaged"),
    "fragments without the end": (
        lambda: cut(clip("ismv", options=B_FRAMES)),
        "is cut short or damaged",
    ),
    "AVI without its end": (lambda: cut(clip("avi", "mpeg4")), "is cut short or damaged"),
    "days": (
        lambda: clip(
            "matroska", "mjpeg", 3, pixels="yuvj420p", milliseconds=[0, 1000, 3 * 86_400_000]
        ),
        r"lasts 259,200 s, longer than the 43,200 s allowed; cut it",
    ),
    "declared as days": (declared_as_days, "lasts 259,200 s, longer than the 43,200 s allowed"),
    "8K": (
        lambda: large_frame((7680, 4320)),
        "has frames of 7680 x 4320 pixels, more than the 16,777,216 pixels allowed",
    ),
    "8K declared as small": (
        lambda: large_frame((64, 64)),
        "has frames of 7680 x 4320 pixels, more than the 16,777,216 pixels allowed",
    ),
    "no frames": (no_frames, "has no frames; send a video that has at least one"),
    "unknown codec": (unknown_codec, "is in a codec that cannot be decoded; send it as H.264 MP4"),
}
"""Each with the error, without the input's name, as a regular expression."""
