"""The clip of a request: its frames, whether the model takes them, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from xgenmm.config import INTERLEAVE, VIDEO_128, XGenMMConfig
from xgenmm.engine.request import Request, Usage
from xgenmm.errors import InputError
from xgenmm.preprocessing.prompts import IMAGE
from xgenmm.preprocessing.tiling import TiledImage
from xgenmm.preprocessing.video import MAX_FRAMES, Video


@dataclass(frozen=True)
class CachedClip:
    """Frames of a file, with the size that an `LRUCache` needs."""

    video: Video[TiledImage]

    @property
    def nbytes(self) -> int:
        """Size of the frames in bytes."""
        return sum(frame.nbytes for frame in self.video.frames)


def frames(request: Request) -> Sequence[Image.Image | TiledImage]:
    """The frames of a request's video, in order."""
    if isinstance(request.video, Video):
        return request.video.frames
    if isinstance(request.video, np.ndarray):
        return [Image.fromarray(frame) for frame in request.video]
    return request.video


def check_takes_video(config: XGenMMConfig) -> None:
    """Raise InputError, with the models to use instead, if the model takes no videos."""
    if config.temporal is None and not config.frames_as_images:
        raise InputError(
            "video", f"this model takes no videos; use {VIDEO_128}, or {INTERLEAVE} for images"
        )


def check_frames(config: XGenMMConfig, request: Request) -> None:
    """Raise InputError unless the model takes the request's video, and as many frames."""
    video, count = request.video, len(request.video)
    if isinstance(video, np.ndarray) and (
        video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or not video.size
    ):
        raise InputError(
            "video",
            f"must be uint8 [frames, height, width, 3], not {video.dtype} {list(video.shape)}",
        )
    if count:
        check_takes_video(config)
    if config.temporal is None:
        return
    if count and request.images:
        raise InputError(
            "video",
            "cannot be combined with images, which are the frames of a clip too; give one of the "
            "two",
        )
    name, count = ("video", count) if count else ("images", len(request.images))
    if count > MAX_FRAMES:
        raise InputError(name, f"{count} frames given, but a clip may have at most {MAX_FRAMES}")


def vision_tokens(config: XGenMMConfig, images: Sequence[TiledImage]) -> int:
    """How many vision tokens images become, or the clip of which they are the frames."""
    if config.temporal is not None:
        return config.clip_tokens if images else 0
    return config.resampler.num_latents * sum(image.pixels.shape[0] for image in images)


def fit_frames(
    config: XGenMMConfig, request: Request, images: list[TiledImage], text_tokens: int
) -> tuple[Request, list[TiledImage]]:
    """Leave out frames, evenly, for which the context of an image model has no room.

    At least one stays, and all of them if the texts place each frame with an `<image>` of its own.

    images: of the request, then the frames of its video.
    text_tokens: of the prompt with all frames.

    Returns the request and its images with the other frames.
    """
    images, tiled = images[: len(request.images)], images[len(request.images) :]
    used = text_tokens + vision_tokens(config, images) + request.sampling.max_new_tokens
    largest = max(vision_tokens(config, [frame]) for frame in tiled)
    count = max(1, (config.decoder.max_positions - used) // largest)
    if count >= len(tiled) or places(request) > 1:
        return request, [*images, *tiled]
    kept = [int(index) for index in np.linspace(0, len(tiled) - 1, count).round()]
    tiled = [tiled[index] for index in kept]
    video = request.video.take(kept) if isinstance(request.video, Video) else tiled
    return replace(request, video=video), [*images, *tiled]


def place_frames(request: Request) -> Request:
    """Let the only `<image>` in a request's texts, if there is just one, stand for all frames."""
    if request.images or places(request) != 1:
        return request
    marks = "\n".join([IMAGE] * len(request.video))
    messages = [
        replace(message, content=message.content.replace(IMAGE, marks))
        if message.role == "user"
        else message
        for message in request.messages
    ]
    question = request.question.replace(IMAGE, marks)
    return replace(request, question=question, messages=tuple(messages))


def places(request: Request) -> int:
    """How many images the question and the messages from the user place."""
    users = [message.content for message in request.messages if message.role == "user"]
    return sum(text.count(IMAGE) for text in [*users, request.question])


def record_clip(
    config: XGenMMConfig, request: Request, images: Sequence[TiledImage], usage: Usage
) -> None:
    """Record what a request's clip consists of, if it has one.

    images: of the request, then the frames of its video.
    """
    count = len(images) if config.temporal is not None else len(request.video)
    if not count:
        return
    usage.video_frames = count
    usage.video_tokens = vision_tokens(config, images[-count:])
    if isinstance(request.video, Video):
        usage.frame_times = list(request.video.times)
