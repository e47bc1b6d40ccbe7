"""Messages and settings of lmms-eval -> requests of the engine.

A message is `{"role": ..., "content": [part, ...]}`; a part is a text, an image or a video. Needs
no lmms-eval.
"""

import mimetypes
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from xgenmm.config import TextConfig
from xgenmm.engine.request import Request
from xgenmm.engine.sampling_params import LIMITS, SamplingParams
from xgenmm.errors import InputError
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import IMAGE, Message
from xgenmm.preprocessing.video import Video, read_video

FEW_SHOT_DELIMITER = "\n\n"
"""The stop string of tasks that name none."""

JsonMessage = Mapping[str, Any]


def user_message(visuals: Sequence[Any] | None, text: str) -> JsonMessage:
    """Make a message with what a task shows, then its text."""
    parts = [{"type": _visual_type(visual), "url": visual} for visual in visuals or ()]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _visual_type(visual: object) -> str:
    is_video = isinstance(visual, str) and not str(mimetypes.guess_type(visual)[0]).startswith(
        "image/"
    )
    return "video" if is_video else "image"


def message_images(message: JsonMessage) -> list[Image.Image]:
    """Read the images of a message, in order."""
    return [_read_image(part["url"]) for part in _parts(message) if part["type"] == "image"]


def chat_request(
    messages: Sequence[JsonMessage],
    text: TextConfig,
    sampling: SamplingParams,
    *,
    system_prompt: str | None = None,
    num_frames: int | None = None,
) -> Request:
    """Make a request from a conversation whose last message is the question.

    An image becomes `<image>`, and a space for chat models, where it stands in the message, as in
    the authors' evaluation. If the texts of a message name as many images by `<image>` as it has,
    they place them; otherwise their `<image>` are removed.

    system_prompt: of a conversation that has none. num_frames: to take from a video.

    Raises:
        InputError: a part is neither text, image nor video, or cannot be read.
    """
    mark = IMAGE if text.prompt == "few_shot" else f"{IMAGE} "
    images: list[Image.Image] = []
    videos: list[Video[Image.Image]] = []
    turns: list[Message] = []
    for message in messages:
        content = _message_text(message, mark)
        if message["role"] == "system":
            system_prompt = content
            continue
        turns.append(Message(message["role"], content))
        images += message_images(message)
        videos += [_read_clip(p, num_frames) for p in _parts(message) if p["type"] == "video"]
    if len(videos) > 1:
        raise InputError("video", f"{len(videos)} videos given; a request may have one")
    return Request(
        question=turns.pop().content,
        images=images,
        system_prompt=system_prompt,
        messages=tuple(turns),
        sampling=sampling,
        video=videos[0] if videos else (),
    )


def _parts(message: JsonMessage) -> list[Mapping[str, Any]]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    for part in parts:
        if part["type"] not in ("text", "image", "video"):
            raise InputError("content", f"must be text, image or video, not {part['type']}")
    return parts


def _message_text(message: JsonMessage, mark: str) -> str:
    parts = _parts(message)
    places = sum(part["text"].count(IMAGE) for part in parts if part["type"] == "text")
    placed = places == sum(part["type"] == "image" for part in parts)
    text = ""
    for part in parts:
        if part["type"] == "text":
            text += part["text"] if placed else part["text"].replace(IMAGE, "")
        elif part["type"] == "image" and not (places and placed):
            text += mark
    return text


def _read_image(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Mapping):  # a dataset's column that is not decoded
        source = source["bytes"] or source["path"]
    return read_image(source)


def _read_clip(part: Mapping[str, Any], num_frames: int | None) -> Video[Image.Image]:
    source, start, end = part["url"], part.get("start_time"), part.get("end_time")
    if not isinstance(source, str):
        raise InputError("video", f"must be the path of a file, not {type(source).__name__}")
    return read_video(source, num_frames, start=start, end=end)


def sampling_params(
    settings: Mapping[str, Any], text: TextConfig, max_new_tokens: int, seed: int
) -> SamplingParams:
    """Make sampling settings of a task's `generation_kwargs`; greedy unless they ask for sampling.

    Chat models may write paragraphs, so they do not stop at lmms-eval's default `until`, an empty
    line. Settings that the engine does not have are ignored.

    max_new_tokens: if the task does not set it. seed: of sampled answers.
    """
    until = settings.get("until") or ()
    stops = [until] if isinstance(until, str) else list(until)
    if text.prompt == "chat":
        stops = [stop for stop in stops if stop != FEW_SHOT_DELIMITER]
    temperature = settings.get("temperature") or 0.0
    if settings.get("do_sample") is False:
        temperature = 0.0
    most = int(LIMITS["max_new_tokens"][1])
    top_p = settings.get("top_p")
    return SamplingParams(
        max_new_tokens=min(settings.get("max_new_tokens") or max_new_tokens, most),
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=settings.get("top_k") or 0,
        num_beams=settings.get("num_beams") or 1,
        stop_sequences=tuple(stop for stop in stops if stop),
        seed=seed,
    )
