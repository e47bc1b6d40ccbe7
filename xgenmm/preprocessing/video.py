"""Video files to the frames that a model sees.

Frames are chosen and converted as by the authors' inference script, which decodes the whole file
with `torchvision.io.read_video`: see `frame_indices` for the choice. Colors go by BT.601 and its
limited range whatever the file says, as in PyAV up to 16, and rotation tags are ignored; so a file
tagged BT.709 has slightly other colors than in a player. Pixel aspect ratios are ignored too.
The pixels are those of PyAV 12, the authors', except for 4:2:0 frames of odd height, in NV12 or of
more than 8 bits: newer versions of FFmpeg place their chroma samples differently.

Files are untrusted. `VideoLimits` bounds what reading one may take; to bound its memory too, and
to survive faults in a codec, decode in `decoders.ImageDecoders`.
"""

import io
import math
import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeVar

from PIL import Image

from xgenmm.errors import InputError, printable
from xgenmm.preprocessing.frame_indices import frame_indices
from xgenmm.preprocessing.video_decoder import (
    UnreliablePacketsError,
    VideoDecoder,
    VideoLimits,
    explained,
    too_many_bytes,
)

if TYPE_CHECKING:
    import av

DEFAULT_FRAMES = 8
"""As many as the models were trained with."""

MAX_FRAMES = 64

Frame = TypeVar("Frame")
Source = bytes | str | os.PathLike[str] | BinaryIO

_TURNS = {
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
}
"""Transform for each rotation that a file may ask for, in degrees counterclockwise."""


@dataclass(frozen=True)
class FrameSelection:
    """Which frames to take from a clip.

    num_frames: 1 to `MAX_FRAMES`; None takes `DEFAULT_FRAMES`, or every frame of a shorter clip.
    start, end: in seconds after the first frame, both included; None is the clip's own.
    rotate: turn frames as the file's rotation tag says.
    """

    num_frames: int | None = None
    start: float | None = None
    end: float | None = None
    rotate: bool = False

    def check(self) -> None:
        """Raise InputError for values that fit no clip."""
        if self.num_frames is not None and not 1 <= self.num_frames <= MAX_FRAMES:
            raise InputError("num_frames", f"is {self.num_frames}; must be 1 to {MAX_FRAMES}")
        for name, seconds in (("start", self.start), ("end", self.end)):
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise InputError(name, f"is {seconds}; must be a number of seconds from 0")
        if self.end is not None and self.end < (self.start or 0):
            raise InputError("end", f"is {self.end:g} s, before start; must not be before it")

    def indices(self, times: Sequence[float], name: str) -> list[int]:
        """Indices of the frames to take from a clip whose frames have these ascending times."""
        if self.start is not None and self.start > times[-1]:
            raise InputError(
                "start",
                f"is {self.start:g} s, but the last frame of {name} is at {times[-1]:.3f} s; "
                "set an earlier one",
            )
        first = 0 if self.start is None else bisect_left(times, self.start)
        last = len(times) if self.end is None else bisect_right(times, self.end)
        total = last - first
        if total < 1:
            raise InputError("end", f"leaves no frame of {name} after start; set a later one")
        if self.num_frames is not None and self.num_frames > total:
            part = "" if total == len(times) else " between start and end"
            raise InputError(
                "num_frames",
                f"is {self.num_frames}, but {name} has {total} frames{part}; set at most {total}",
            )
        chosen = frame_indices(total, self.num_frames or min(DEFAULT_FRAMES, total))
        return [first + index for index in chosen]


@dataclass(frozen=True)
class Video(Generic[Frame]):
    """The frames taken from a clip, in order.

    Attributes:
        frames: RGB images as stored, or what `decode_video` made of them.
        times: of each frame, in seconds after the clip's first frame.
        indices: of each frame among the clip's.
        total: frames of the whole clip.
    """

    frames: tuple[Frame, ...]
    times: tuple[float, ...]
    indices: tuple[int, ...]
    total: int

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, positions: Sequence[int]) -> "Video[Frame]":
        """The same clip with only the frames at these positions among `frames`."""
        return Video(
            tuple(self.frames[position] for position in positions),
            tuple(self.times[position] for position in positions),
            tuple(self.indices[position] for position in positions),
            self.total,
        )


def read_video(
    source: Source,
    num_frames: int | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    rotate: bool = False,
    limits: VideoLimits | None = None,
    name: str = "video",
) -> Video[Image.Image]:
    """Read frames of a clip, evenly spread, in the order and with the pixels the models expect.

    Any container and codec of PyAV that holds its data itself: MP4, WebM, MKV, MOV, AVI, GIF and
    more. Cover images are not part of the video.

    Args:
        source: the content of a file, a path, or a file opened in binary mode.
        num_frames, start, end, rotate: see `FrameSelection`.
        limits: what reading may take.
        name: the input's name in error messages.

    Raises:
        InputError: the file is missing, not a video, damaged or cut short, exceeds a limit, or
            lacks the frames asked for; or PyAV is not installed.
    """
    selection = FrameSelection(num_frames, start, end, rotate)
    return decode_video(source, lambda image: image, selection, limits, name)


def decode_video(
    source: Source,
    convert: Callable[[Image.Image], Frame],
    selection: FrameSelection | None = None,
    limits: VideoLimits | None = None,
    name: str = "video",
) -> Video[Frame]:
    """Like `read_video`, but pass each frame through `convert` as soon as it is decoded."""
    selection, limits = selection or FrameSelection(), limits or VideoLimits()
    selection.check()
    if find_spec("av") is None:
        raise InputError(name, "reading videos needs PyAV; run `pip install av`")

    def finish(
        frames: "Iterator[av.VideoFrame]", times: Sequence[float], indices: Sequence[int]
    ) -> Video[Frame]:
        with explained(name, "cannot be converted to RGB; send it as H.264 MP4"):
            converted = tuple(convert(_to_image(frame, selection.rotate)) for frame in frames)
        chosen = tuple(times[index] for index in indices)
        return Video(converted, chosen, tuple(indices), len(times))

    with _open_source(source, limits, name) as file:
        decoder = VideoDecoder(file, name, limits)
        try:
            times = decoder.times_from_packets()
            indices = selection.indices(times, name)
            return finish(decoder.decode_at(indices), times, indices)
        except UnreliablePacketsError:
            times = decoder.times_of_all()
            indices = selection.indices(times, name)
            wanted = set(indices)
            every = enumerate(decoder.decode_all())
            return finish((frame for i, frame in every if i in wanted), times, indices)
        finally:
            decoder.close()


def _to_image(frame: "av.VideoFrame", rotate: bool) -> Image.Image:
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace="ITU601",
        src_color_range=_source_range(frame),
        threads=1,
    )
    image = Image.fromarray(rgb.to_ndarray())
    turn = _TURNS.get(round(frame.rotation)) if rotate else None
    return image if turn is None else image.transpose(turn)


def _source_range(frame: "av.VideoFrame") -> str | None:
    """The range of the samples as PyAV 16 saw it: by the pixel format, not by the file's tag."""
    return "MPEG" if frame.format.name.startswith(("yuv4", "yuva", "nv", "p0")) else None


@contextmanager
def _open_source(source: Source, limits: VideoLimits, name: str) -> Iterator[BinaryIO]:
    with _as_file(source, limits, name) as file:
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            raise InputError(name, "the file is empty; send a video")
        if size > limits.file_bytes:
            raise InputError(name, too_many_bytes(limits))
        yield file


@contextmanager
def _as_file(source: Source, limits: VideoLimits, name: str) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would wait for someone to write
                raise OSError("not a regular file")
            file = path.open("rb")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                name, f"cannot open {printable(path)!r} ({reason}); give the path of a video"
            ) from error
        with file:
            yield file
    elif source.seekable():
        yield source
    else:
        yield io.BytesIO(source.read(limits.file_bytes + 1))
