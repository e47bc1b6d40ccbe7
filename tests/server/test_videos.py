"""Clips in predictions of Cog's server, with a tiny video checkpoint and with the demo."""

import base64
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.client import SECONDS, answer, ask, assert_answers, data_url, when_free
from tests.support.clips import BAD, clip
from tests.support.odd_server import Connection, odd_server
from tests.support.paths import DEMO
from tests.support.server import LocalServer
from xgenmm import read_video
from xgenmm.checkpoints.registry import read_config

CLIP = clip(count=20)
QUESTION = "Which way does it move?"
SHORT = {"max_new_tokens": 8}


def video_url(content: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"


def test_clip_comes_from_a_data_url_an_http_url_or_as_frames(
    video_server: LocalServer, file_server: str, tmp_path: Path
) -> None:
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    first = ask(video_server, video=video_url(CLIP), question=QUESTION, **SHORT)
    fetched = ask(video_server, video=f"{file_server}/clip.mp4", question=QUESTION, **SHORT)
    video = read_video(CLIP)
    frames = [data_url(frame, "PNG") for frame in video.frames]
    images = ask(video_server, image=frames[0], images=frames[1:], question=QUESTION, **SHORT)
    assert answer(first) == answer(fetched) == answer(images)
    metrics = first["metrics"]
    assert metrics["video_frames"] == images["metrics"]["video_frames"] == 8
    assert metrics["frame_times"] == fetched["metrics"]["frame_times"] == list(video.times)
    assert "frame_times" not in images["metrics"]
    assert metrics["video_tokens"] == metrics["image_tokens"] == 4
    assert fetched["metrics"]["cached_tokens"] > 0


def test_part_of_a_clip_and_a_conversation_about_it(video_server: LocalServer) -> None:
    part = {"video": video_url(CLIP), "start": 0.2, "end": 0.4} | SHORT
    first = ask(video_server, num_frames=2, **part)
    assert first["metrics"]["frame_times"] == [0.2, 0.4]
    turns = [
        {"role": "user", "content": "Describe this video."},
        {"role": "assistant", "content": answer(first)},
    ]
    second = ask(video_server, num_frames=2, messages=turns, question="And then?", **part)
    assert second["metrics"]["cached_tokens"] > 0
    assert ask(video_server, **part)["metrics"]["video_frames"] == 6  # all that there are


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "end before start": ({"start": 2, "end": 1}, "end: is 1 s, before start"),
    "start after the clip": ({"start": 9}, "start: is 9 s, but the last frame of video is at 0.76"),
    "more frames than the clip has": ({"num_frames": 21}, "num_frames: is 21, but video has 20"),
    "together with an image": ({"image": "data:,"}, "video: cannot be combined with image or"),
    "file of the server": ({"video": __file__}, "video: must be an http"),
    "two places": ({"question": "<image> <image>"}, "question: <image> occurs 2 times"),
    "not base64": ({"video": "data:video/mp4;base64,?"}, "video: the data URL is not valid"),
}


@pytest.mark.parametrize("kind", [*BAD, *BAD_INPUTS])
def test_error_names_what_is_wrong_with_a_clip(video_server: LocalServer, kind: str) -> None:
    if kind in BAD:
        make, message = BAD[kind]
        inputs, message = {"video": video_url(make())}, f"video: {message}"
    else:
        inputs, message = BAD_INPUTS[kind]
        inputs, message = {"video": video_url(CLIP)} | inputs, re.escape(message)
    prediction = ask(video_server, **inputs)
    assert prediction["status"] == "failed"
    assert re.search(message, prediction["error"])


def test_cancelling_ends_the_download_of_a_clip(video_server: LocalServer) -> None:
    arrived = threading.Event()

    def drip(connection: Connection) -> None:
        arrived.set()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\n\r\n")
        connection.drip(b"a")

    url = f"{video_server.url}/predictions/clip"
    headers = {"Prefer": "respond-async"}
    with odd_server() as odd:
        odd.answers["a"] = drip
        inputs = {"video": odd.url("a")}
        when_free(lambda: httpx.put(url, json={"input": inputs}, headers=headers))
        assert arrived.wait(SECONDS)
        assert httpx.post(f"{url}/cancel").status_code == 200
        assert odd.closed.wait(SECONDS)


def test_image_model_gets_the_frames_as_images(server: LocalServer) -> None:
    prediction = ask(server, video=video_url(CLIP), num_frames=3, question=QUESTION, **SHORT)
    assert answer(prediction)
    assert prediction["metrics"]["video_frames"] == 3
    latents = read_config(DEMO).resampler.num_latents
    assert prediction["metrics"]["video_tokens"] == 3 * latents
    assert_answers(server)
