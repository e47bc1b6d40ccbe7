"""Frames of videos: the authors' choice and pixels, found by seeking; and bad files."""

import io
import os
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.support.clips import B_FRAMES, BAD, clip, decode_everything, moving_blocks, silence
from xgenmm import InputError, read_video
from xgenmm.preprocessing.frame_indices import frame_indices
from xgenmm.preprocessing.video import Video
from xgenmm.preprocessing.video_decoder import VideoDecoder, VideoLimits

VARIABLE = [40 * i + 13 * (i % 3) + 500 * (i > 30) for i in range(60)]
BT709, FULL_RANGE = 1, 2  # of FFmpeg's AVColorSpace and AVColorRange

SEEKABLE: dict[str, Callable[[], bytes]] = {
    "H.264 with B-frames": lambda: clip(options=B_FRAMES),
    "H.264 with open groups": lambda: clip(options=B_FRAMES | {"x264-params": "open-gop=1"}),
    "H.264 of variable rate": lambda: clip(options=B_FRAMES, milliseconds=VARIABLE),
    "H.264 tagged BT.709": lambda: clip(options=B_FRAMES, colorspace=BT709),
    "H.264 of full range": lambda: clip(options=B_FRAMES, color_range=FULL_RANGE),
    "H.264 in MPEG-TS": lambda: clip("mpegts", options=B_FRAMES),
    "H.264 in MKV, odd size": lambda: clip("matroska", size=(97, 63), pixels="yuv444p"),
    "HEVC": lambda: clip(codec="libx265", options={"x265-params": "log-level=none"}, gop_size=20),
    "VP9": lambda: clip("webm", "libvpx-vp9", gop_size=15),
    "VP9, odd size, full range": lambda: clip(
        "webm", "libvpx-vp9", size=(97, 63), gop_size=15, color_range=FULL_RANGE
    ),
    "MPEG-4 in MP4": lambda: clip(codec="mpeg4", options={"bf": "2", "g": "12"}),
    "MPEG-4 in AVI": lambda: clip("avi", "mpeg4", options={"bf": "2", "g": "12"}),
    "GIF": lambda: clip("gif", "gif", 20, pixels="rgb8"),
    "APNG": lambda: clip("apng", "apng", 10, pixels="rgb24"),  # calls every frame a key frame
    "one frame": lambda: clip(count=1),
    "without audio, 15 frames": lambda: clip(count=15),
}

UNRELIABLE: dict[str, Callable[[], bytes]] = {
    "B-frames in AVI, which numbers packets": lambda: clip("avi", options=B_FRAMES),
    "without a container": lambda: clip("h264", options=B_FRAMES),
    "key frames that are only refreshed by and by": lambda: clip(
        "matroska", options={"bf": "0", "g": "30", "x264-params": "intra-refresh=1"}
    ),
}


def assert_as_decoding_everything(content: bytes, num_frames: int | None) -> None:
    every = decode_everything(content)
    video = read_video(content, num_frames)
    assert video.total == len(every)
    assert list(video.indices) == frame_indices(len(every), len(video.frames))
    for image, index in zip(video.frames, video.indices, strict=True):
        np.testing.assert_array_equal(np.asarray(image), every[index])


@pytest.mark.parametrize("kind", SEEKABLE)
def test_frames_found_by_seeking_equal_decoding_everything(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(VideoDecoder, "decode_all")
    content = SEEKABLE[kind]()
    assert_as_decoding_everything(content, None)
    assert_as_decoding_everything(content, 1)


@pytest.mark.parametrize("kind", UNRELIABLE)
def test_frames_equal_decoding_everything_where_packets_do_not_tell(kind: str) -> None:
    assert_as_decoding_everything(UNRELIABLE[kind](), 5)


def test_frames_between_are_not_read_a_second_time() -> None:
    read = 0

    class Recorder(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            data = super().read(size)
            read += len(data)
            return data

    content = clip("avi", "mjpeg", 100, (192, 128), pixels="yuvj420p")
    assert read_video(Recorder(content), 3).indices == (1, 50, 99)
    assert read < 1.5 * len(content)  # all packets once, and three frames


def test_colors_are_those_of_bt601_in_limited_range() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = BT709, FULL_RANGE
        frame = av.VideoFrame(16, 16, "yuv420p")
        for plane, level in zip(frame.planes, (120, 90, 180), strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    (image,) = read_video(file.getvalue()).frames
    luma, blue, red = 1.164 * (120 - 16), 90 - 128, 180 - 128
    expected = (luma + 1.596 * red, luma - 0.392 * blue - 0.813 * red, luma + 2.017 * blue)
    assert image.getpixel((8, 8)) == pytest.approx(expected, abs=2)


def test_times_are_in_seconds_after_the_first_frame() -> None:
    video = read_video(clip("mpegts", options=B_FRAMES))  # its clock starts elsewhere
    assert video.times == pytest.approx([index / 25 for index in video.indices], abs=1e-4)
    video = read_video(clip(options=B_FRAMES, milliseconds=VARIABLE))
    assert video.times == pytest.approx([VARIABLE[i] / 1000 for i in video.indices], abs=1e-3)


def test_start_and_end_select_a_part() -> None:
    content = clip(options=B_FRAMES)
    whole = decode_everything(content)
    video = read_video(content, start=0.4, end=1.2)  # both frames included: 10 to 30
    assert video.indices == tuple(10 + index for index in frame_indices(21, 8))
    assert video.total == 60
    for image, index in zip(video.frames, video.indices, strict=True):
        np.testing.assert_array_equal(np.asarray(image), whole[index])
    assert read_video(content, start=2.3).indices == (58, 59)
    assert read_video(content, end=0).indices == (0,)


def test_hidden_frames_of_vp8_do_not_count() -> None:
    content = clip("webm", "libvpx", 40, gop_size=20)
    file = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(file, "w", format="webm") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(video=0)):
            if packet.size:
                payload = bytearray(bytes(packet))
                payload[0] &= 0xFF if i % 7 else 0xEF  # the flag `show_frame`
                hidden = av.Packet(bytes(payload))
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.is_keyframe, hidden.stream = packet.is_keyframe, stream
                output.mux(hidden)
    assert len(decode_everything(file.getvalue())) == 34
    assert_as_decoding_everything(file.getvalue(), None)


def with_cover(codec: str) -> bytes:
    """An MP4 of a cover image and a stream of video or audio."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        cover = output.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        if codec == "aac":
            stream = output.add_stream(codec, rate=8000, layout="mono")
            frames = [silence()]
        else:
            stream = output.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            frames = [av.VideoFrame.from_ndarray(array) for array in moving_blocks(20, 96, 64)]
        output.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        output.mux(cover.encode())
        for frame in frames:
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def test_cover_image_is_not_the_video() -> None:
    video = read_video(with_cover("libx264"))
    assert (video.total, video.frames[0].size) == (20, (96, 64))
    with pytest.raises(InputError, match=r"^video: has only a cover image; send a file with a"):
        read_video(with_cover("aac"))


@pytest.mark.parametrize(
    ("matrix", "turn"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
def test_rotation_tag_is_followed_on_request(matrix: tuple[int, ...], turn: int) -> None:
    content = bytearray(clip(options=B_FRAMES))
    place = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of fields
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    stored = read_video(bytes(content), 4)
    upright = read_video(bytes(content), 4, rotate=True)
    for before, after in zip(stored.frames, upright.frames, strict=True):
        assert before.size == (96, 64)
        np.testing.assert_array_equal(np.asarray(after), np.rot90(np.asarray(before), turn))


def test_sources_may_be_paths_and_files(tmp_path: Path) -> None:
    content = clip(count=20)
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with path.open("rb") as file:
        videos: list[Video[Any]] = [read_video(s) for s in (content, path, str(path), file)]
    assert all(video == videos[0] for video in videos)


@pytest.mark.parametrize("kind", BAD)
def test_error_says_what_is_wrong_with_a_file(kind: str) -> None:
    make, message = BAD[kind]
    with pytest.raises(InputError, match=f"^clips\\[2\\]: {message}"):
        read_video(make(), name="clips[2]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, r"^num_frames: is 0; must be 1 to 64$"),
        ({"num_frames": 65}, r"^num_frames: is 65; must be 1 to 64$"),
        ({"num_frames": 21}, r"^num_frames: is 21, but video has 20 frames; set at most 20$"),
        (
            {"num_frames": 8, "end": 0.1},
            r"^num_frames: is 8, but video has 3 frames between start and end; set at most 3$",
        ),
        ({"start": 2, "end": 1}, r"^end: is 1 s, before start; must not be before it$"),
        ({"start": -1}, r"^start: is -1; must be a number of seconds from 0$"),
        ({"end": float("nan")}, r"^end: is nan; must be a number of seconds from 0$"),
        ({"start": 9}, r"^start: is 9 s, but the last frame of video is at 0.760 s; set an"),
        ({"start": 0.41, "end": 0.42}, r"^end: leaves no frame of video after start; set a later"),
        ({"limits": VideoLimits(file_bytes=99)}, r"^video: has more than the 99 bytes allowed;"),
        ({"limits": VideoLimits(seconds=0)}, r"^video: takes more than the 0 s of processor time"),
        ({"limits": VideoLimits(duration=0.5)}, r"^video: lasts 1 s, longer than the 0 s allowed"),
        ({"limits": VideoLimits(frame_pixels=99)}, r"^video: has frames of 96 x 64 pixels, more"),
    ],
)
def test_error_names_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_video(clip(count=20), **arguments)


def test_source_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, reason in ((tmp_path / "absent.mp4", "No such file"), (tmp_path / "fifo", "not a r")):
        with pytest.raises(InputError, match=f"^video: cannot open '{path}' \\({reason}"):
            read_video(path)


def test_error_says_how_to_install_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgenmm.preprocessing.video.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^video: reading videos needs PyAV; run `pip install av"):
        read_video(b"")


def test_files_that_refer_to_others_open_nothing(tmp_path: Path) -> None:
    (tmp_path / "clip.ts").write_bytes(clip("mpegts"))
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for url in (f"http://127.0.0.1:{server.server_port}/clip.ts", f"{tmp_path}/clip.ts"):
            for content in (
                f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
                f"ffconcat version 1.0\nfile '{url}'\n",
                f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\na=control:{url}\n"
                "t=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
            ):
                path = tmp_path / "list.m3u8"
                path.write_text(content)
                for source in (content.encode(), path):
                    with pytest.raises(InputError, match=r"^video: is not a video"):
                        read_video(source)
        server.shutdown()
        thread.join()
    assert requests == []
