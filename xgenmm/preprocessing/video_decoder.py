"""FFmpeg by way of PyAV: the frames of a file in order of display, all of them or a few by seeking.

PyAV is an optional dependency and imported here only.
"""

import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

from xgenmm.errors import InputError, printable

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

FORMATS = (
    "mov,matroska,avi,gif,apng,mpegts,mpeg,flv,asf,ogg,mxf,ivf,nut,dv,"
    "h264,hevc,mpegvideo,m4v,obu,yuv4mpegpipe"
)
"""Containers that hold their data themselves; playlists and the like, which name other files, are
refused by FFmpeg's `format_whitelist`."""

SEEKABLE_CODECS = frozenset(
    ("h264", "hevc", "av1", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "mjpeg", "prores")
)
"""Codecs whose key frames need no earlier frame; FFmpeg marks every frame of APNG as one."""

DECLARING_FORMATS = ("mov", "matroska")
"""Containers whose header states the duration. FFmpeg estimates that of others."""

SLACK_SECONDS = 0.5
SLACK_SHARE = 0.05
"""How much earlier than declared a clip may end, in seconds and as a share of its duration."""


class UnreliablePacketsError(Exception):
    """Packets and decoded frames disagree, so frames cannot be found by seeking."""


@dataclass(frozen=True)
class VideoLimits:
    """What reading a video may take.

    file_bytes: size of the file.
    frame_pixels: width times height; the default admits 4K, not 8K.
    duration: of the clip, in seconds, whether declared or real.
    seconds: of processor time.
    """

    file_bytes: int = 512_000_000
    frame_pixels: int = 4096 * 4096
    duration: float = 12 * 3600.0
    seconds: float = 30.0


@dataclass(frozen=True)
class Entry:
    """A frame, known from its packet; times in units of the stream's time base."""

    pts: int
    dts: int | None
    is_key: bool


class _Run:
    """Frames in order of display from a key frame on, each checked to be where its packet was."""

    def __init__(
        self, frames: Iterator["av.VideoFrame"], first: int, positions: Mapping[int | None, int]
    ) -> None:
        self._frames, self._first, self._positions = frames, first, positions
        self.following = first
        """Index of the next frame."""

    def advance_to(self, index: int) -> "av.VideoFrame":
        """Decode up to the frame of an index."""
        for frame in self._frames:
            position = self._positions.get(frame.pts, -1)
            if 0 <= position < self._first:
                continue  # shown before the key frame but stored after it: an open group
            if position != self.following:
                break
            self.following += 1
            if position == index:
                return frame
        raise UnreliablePacketsError


class VideoDecoder:
    """An open file. To be used by one thread.

    All methods raise InputError, with the name given here, for a file that is damaged or exceeds
    the limits.
    """

    def __init__(self, file: BinaryIO, name: str, limits: VideoLimits) -> None:
        self._file, self._name, self._limits = file, name, limits
        self._deadline = time.thread_time() + limits.seconds
        self._entries: list[Entry] = []
        self._positions: dict[int | None, int] = {}
        self.open()

    def open(self) -> None:
        """Start again at the beginning of the file."""
        with explained(self._name, "is not a video or is damaged; send MP4, WebM, MKV, MOV or GIF"):
            self._container = _open(self._file, self._limits)
        self._stream = _video_stream(self._container, self._name)
        self._check_size(self._stream.codec_context)
        # Recordings of broadcasts often have gaps, which decoders conceal.
        self._is_broadcast = self._container.format.name == "mpegts"
        declared = self._declared_duration()
        if declared > self._limits.duration:
            raise self._too_long(declared)
        self._stream.codec_context.thread_count = 1  # frames and memory that the limits count
        self._stream.codec_context.options = {"max_pixels": _max_pixels(self._limits)}

    def close(self) -> None:
        """Close the container; the file stays open."""
        self._container.close()

    def times_from_packets(self) -> list[float]:
        """Times of all frames in seconds, ascending, without decoding any.

        Raises UnreliablePacketsError if packets do not tell.
        """
        entries: list[Entry] = []
        end = 0.0
        for packet in self._packets(every_stream=True):
            if packet.pts is not None and packet.time_base is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != self._stream.index:
                continue
            if packet.is_discard or _is_hidden(packet):
                continue
            if packet.pts is None:
                raise UnreliablePacketsError
            entries.append(Entry(packet.pts, packet.dts, packet.is_keyframe))
        entries.sort(key=lambda entry: entry.pts)
        self._entries = entries
        self._positions = {entry.pts: i for i, entry in enumerate(entries)}
        if len(self._positions) < len(entries):
            raise UnreliablePacketsError
        times = self._seconds([entry.pts for entry in entries])
        self._check_duration(times, end)
        return times

    def decode_at(self, indices: Sequence[int]) -> Iterator["av.VideoFrame"]:
        """Decode frames by their ascending indices in `times_from_packets`, seeking to key frames.

        Raises UnreliablePacketsError if a frame is not where its packet was.
        """
        keys = [i for i, entry in enumerate(self._entries) if entry.is_key]
        if self._stream.codec_context.codec.canonical_name not in SEEKABLE_CODECS:
            keys = keys[:1]
        run: _Run | None = None
        for index in indices:
            earlier = bisect_right(keys, index)
            if not earlier:
                raise UnreliablePacketsError
            if run is None or keys[earlier - 1] > run.following:
                run = self._run_from(keys[earlier - 1])
            yield run.advance_to(index)

    def decode_all(self) -> Iterator["av.VideoFrame"]:
        """Decode every frame from the beginning of the file, in order of display."""
        self.open()
        return self._decode(self._packets(), from_start=True)

    def times_of_all(self) -> list[float]:
        """Times of all frames in seconds, ascending, found by decoding them."""
        stamps = [frame.pts for frame in self.decode_all()]
        known = [pts for pts in stamps if pts is not None]
        if len(known) == len(stamps):
            times = self._seconds(sorted(known))
        else:
            rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
            times = [i / rate for i in range(len(stamps))]
        self._check_duration(times, None)
        return times

    def _run_from(self, key: int) -> "_Run":
        """Start decoding at the key frame of an index, or an earlier one.

        Where seeking lands depends on the container: some go by order of display, others by order
        of decoding, and MPEG-TS has no index.
        """
        entry, start = self._entries[key], self._entries[0]
        for target in (entry.pts, entry.dts, min(start.pts, start.dts or start.pts)):
            if target is None:
                continue
            with explained(self._name, "cannot be searched for frames; send it as MP4"):
                self._container.seek(target, stream=self._stream)
            packets = self._packets()
            landed = next((packet for packet in packets if packet.is_keyframe), None)
            if landed is None:
                continue
            first = self._positions.get(landed.pts, -1)
            if 0 <= first <= key:
                return _Run(self._decode(chain([landed], packets)), first, self._positions)
        raise UnreliablePacketsError

    def _decode(
        self, packets: Iterator["av.Packet[Any]"], from_start: bool = False
    ) -> Iterator["av.VideoFrame"]:
        codec = self._stream.codec_context
        any_frame = False
        problem: InputError | None = None
        # None yields the frames that the decoder still holds.
        for packet in chain["av.Packet[Any] | None"](packets, [None]):
            try:
                with explained(self._name, "cannot be decoded; send it as H.264 MP4"):
                    frames = codec.decode(packet)
            except InputError as error:
                if not from_start:
                    raise UnreliablePacketsError from error
                if any_frame:
                    raise
                problem = problem or error
                continue  # a recording may begin between two key frames
            for frame in frames:
                any_frame = True
                self._check_size(frame)
                yield frame
        if problem and not any_frame:
            raise problem

    def _packets(self, every_stream: bool = False) -> Iterator["av.Packet[Any]"]:
        """Packets with content, until the time is used up."""
        streams = [] if every_stream else [self._stream]
        with explained(self._name, "is damaged or cut short; send it again"):
            for packet in self._container.demux(*streams):
                if time.thread_time() > self._deadline:
                    raise InputError(self._name, too_slow(self._limits))
                is_video = packet.stream_index == self._stream.index
                if is_video and packet.is_corrupt and not self._is_broadcast:
                    raise self._cut_short()
                if packet.size:
                    yield packet

    def _seconds(self, stamps: Sequence[int]) -> list[float]:
        """Times after the first frame."""
        base = self._stream.time_base or 0
        return [float((pts - stamps[0]) * base) for pts in stamps]

    def _declared_duration(self) -> float:
        return (self._container.duration or 0) / 1_000_000  # FFmpeg's AV_TIME_BASE

    def _check_duration(self, times: Sequence[float], end: float | None) -> None:
        """end: of the last packet of any stream, if known."""
        if not times:
            raise InputError(self._name, "has no frames; send a video that has at least one")
        if times[-1] > self._limits.duration:
            raise self._too_long(times[-1])
        if end is None or not self._container.format.name.startswith(DECLARING_FORMATS):
            return
        declared = self._declared_duration()
        gap = max((b - a for a, b in pairwise(times)), default=declared)
        if end < declared - max(SLACK_SECONDS, SLACK_SHARE * declared, gap):
            raise self._cut_short()

    def _check_size(self, sized: "av.VideoFrame | av.VideoCodecContext") -> None:
        width, height, limit = sized.width, sized.height, self._limits.frame_pixels
        if width * height > limit:
            raise InputError(
                self._name,
                f"has frames of {width} x {height} pixels, more than the {limit:,} pixels allowed; "
                "make it smaller",
            )

    def _too_long(self, seconds: float) -> InputError:
        limit = self._limits.duration
        return InputError(
            self._name, f"lasts {seconds:,.0f} s, longer than the {limit:,.0f} s allowed; cut it"
        )

    def _cut_short(self) -> InputError:
        return InputError(self._name, "is cut short or damaged; send it again")


@contextmanager
def explained(name: str, problem: str) -> Iterator[None]:
    """Turn the errors of PyAV, which are of all kinds on damaged files, into InputError."""
    try:
        yield
    except (InputError, UnreliablePacketsError):
        raise
    except MemoryError as error:
        raise InputError(name, "takes too much memory to decode; make it smaller") from error
    except Exception as error:
        raise InputError(name, f"{problem} ({_reason(error)})") from error


def too_slow(limits: VideoLimits) -> str:
    """What is wrong with a video that takes too long."""
    return (
        f"takes more than the {limits.seconds:g} s of processor time allowed; "
        "send a smaller or shorter clip, or set start and end"
    )


def too_many_bytes(limits: VideoLimits) -> str:
    """What is wrong with a file that is too large."""
    return f"has more than the {limits.file_bytes:,} bytes allowed; make it smaller"


def _open(file: BinaryIO, limits: VideoLimits) -> "InputContainer":
    import av

    file.seek(0)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    options["max_pixels"] = _max_pixels(limits)  # FFmpeg decodes a frame to know its format
    return av.open(file, "r", options=options, metadata_errors="replace", io_open=_refuse)


def _refuse(url: str, flags: int, options: object) -> BinaryIO:
    raise PermissionError("the file refers to another file")


def _max_pixels(limits: VideoLimits) -> str:
    """Largest frames for FFmpeg: a bound for files whose header lies.

    It is wider than the limit, so that the error for most frames beyond that can say their size.
    """
    return str(4 * limits.frame_pixels)


def _video_stream(container: "InputContainer", name: str) -> "VideoStream":
    """The first video stream that is not a cover image and can be decoded."""
    from av.stream import Disposition

    streams = container.streams.video
    moving = [s for s in streams if not s.disposition & Disposition.attached_pic]
    if not moving:
        found = "only a cover image" if streams else "no video stream"
        raise InputError(name, f"has {found}; send a file with a video in it")
    for stream in moving:
        if stream.codec_context is not None:
            return stream
    raise InputError(name, "is in a codec that cannot be decoded; send it as H.264 MP4")


def _is_hidden(packet: "av.Packet[Any]") -> bool:
    """Whether a packet is a frame of VP8 that is only referred to (RFC 6386, 9.1)."""
    return packet.stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def _reason(error: Exception) -> str:
    return printable(getattr(error, "strerror", None) or error)
