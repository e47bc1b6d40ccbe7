"""Clips as video files."""

from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av

from scripts.demo_model.drawing import draw
from scripts.demo_video.clip import Clip
from scripts.demo_video.losses import MAX_FRAMES
from xgenmm.preprocessing.frame_indices import frame_indices

RATE = 10  # frames a second


def write_video(
    clip: Clip, file: Path | BinaryIO, frames: int, codec: str = "libx264", form: str = "mp4"
) -> None:
    """Encode a clip as a video of so many frames.

    The clip's time 0 is the first frame that the model sees, and time 1 the last.
    """
    seen = frame_indices(frames, MAX_FRAMES)
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(RATE))
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        for number in range(frames):
            time = (number - seen[0]) / (seen[-1] - seen[0])
            for packet in stream.encode(av.VideoFrame.from_image(draw(clip.scene(time)))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
